//! The command line as a user meets it: help, refusals, exit codes, streams. The texts are kept under `golden/`; after
//! a wanted change `INSTA_UPDATE=always cargo test --test it cli::` writes them anew.

use std::process::Stdio;

use crate::support::{binary, poolshift};

/// Every command; that none is missing here is held against the help text itself.
const COMMANDS: &[&str] = &[
    "sync",
    "diff",
    "verify",
    "export-diff",
    "import-diff",
    "merge-diff",
    "send",
    "receive",
    "inspect",
    "status",
    "replicate",
    "pause",
    "resume",
    "sync-now",
    "throttle",
    "rehearse",
    "cutover",
    "rollback",
    "finalize",
    "retype",
    "deps",
    "flatten",
    "gc",
    "plan",
    "check",
    "demo",
    "completions",
];

fn golden(name: &str, text: &str) {
    insta::with_settings!({snapshot_path => "golden", prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn help_says_what_it_always_said() {
    golden("help", &poolshift(["--help"]).expect_code(0).stdout);
    for command in COMMANDS {
        let run = poolshift([*command, "--help"]).expect_code(0);
        assert_eq!(run.stderr, "", "{command}");
        golden(&format!("help-{command}"), &run.stdout);
    }
}

#[test]
fn every_command_is_known_here() {
    let help = poolshift(["-h"]).expect_code(0).stdout;
    let listed: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()))
        .collect();
    assert_eq!(listed, COMMANDS);
}

#[test]
fn refusals_go_to_standard_error_with_exit_code_2() {
    let mut text = String::new();
    for line in [
        "",
        "frobnicate",
        "sync",
        "sync sata/vm rbd:sas/vm",
        "sync rbd:sata/vm@a rbd:sas/vm",
        "sync rbd:sata/vm rbd:sas/vm --adopt",
        "sync rbd:sata/vm rbd:sas/vm --compress lz4",
        "sync rbd:sata/vm rbd:sas/vm --memory 1M",
        "verify rbd:sata/vm rbd:sas/vm@a",
        "export-diff rbd:sata/vm - --json",
        "status",
        "status rbd:sata/vm",
        "status plan.toml --watch --json",
        "status rbd:sata/vm rbd:sas/vm --volumes",
        "pause plan.toml",
        "pause plan.toml web-1 --all",
        "throttle plan.toml sata --bytes-per-second 0",
        "throttle plan.toml sata --bytes-per-second 100M",
        "throttle plan.toml sata --reset --bytes-per-second 100M",
        "cutover plan.toml",
        "cutover plan.toml web-1 --all",
        "cutover plan.toml web-1 --parallel 2",
        "cutover plan.toml web-1 --method luke",
        "cutover plan.toml web-1 --max-outage 0s",
        "cutover plan.toml web-1 --at tomorrow",
        "cutover plan.toml web-1 --at 22:00 --dry-run",
        "cutover plan.toml web-1 --yes --dry-run",
        "rollback plan.toml web-1 --with-changes --discard-changes",
        "finalize plan.toml",
        "finalize plan.toml web-1 --yes --dry-run",
        "retype plan.toml",
        "retype plan.toml web-1 --all",
        "retype plan.toml --all --yes --dry-run",
        "plan --openstack --data-type sas --gateway gw --strategy retype",
    ] {
        let run = poolshift(line.split_whitespace()).expect_code(2);
        assert_eq!(run.stdout, "", "{line}");
        if line.is_empty() {
            // The whole help, which has its own file.
            assert!(run.stderr.contains("Usage: poolshift"));
            continue;
        }
        text.push_str(&format!("$ poolshift {line}\n{}\n", run.stderr));
    }
    golden("refusals", &text);
}

/// A plan of a server on files, which nobody can cut over, and of a volume on RBD.
const PLAN: &str = r#"
[[server]]
name = "web-1"

[[server.volume]]
name = "web-1-root"
source = "rbd:sata/web-1-root"
target = "file:/nowhere/web-1-root"

[[volume]]
name = "archive"
source = "file:/nowhere/archive"
target = "rbd:sas/archive"
"#;

#[test]
fn what_can_not_be_cut_over_says_why_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("plan.toml");
    std::fs::write(&plan, PLAN).unwrap();
    let mut text = String::new();
    for (command, code) in [
        ("cutover PLAN web-2 --yes", 5),
        ("rollback PLAN web-1-root", 5),
        ("cutover PLAN web-1 --dry-run", 9),
        ("rollback PLAN archive --yes", 9),
        ("finalize PLAN web-2", 5),
        ("finalize PLAN web-1 --dry-run", 9),
        ("cutover PLAN web-1 --at 2020-02-02T02:02:02Z --yes", 2),
        ("cutover PLAN --all --yes --parallel 2", 9),
        ("cutover PLAN --all --yes --json", 9),
        ("retype PLAN web-2 --yes", 5),
        ("retype PLAN web-1 --yes", 2),
        ("retype PLAN --all --yes", 2),
    ] {
        let line: Vec<&str> =
            command.split(' ').map(|word| if word == "PLAN" { plan.to_str().unwrap() } else { word }).collect();
        let run = poolshift(line).expect_code(code);
        let shown = |text: &str| text.replace(plan.to_str().unwrap(), "PLAN");
        text.push_str(&format!("$ poolshift {command}\n{}{}\n", shown(&run.stdout), shown(&run.stderr)));
    }
    golden("cutover-refusals", &text);
}

#[test]
fn version_is_the_packages() {
    let run = poolshift(["--version"]).expect_code(0);
    assert_eq!(run.stdout, concat!("poolshift ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn completions_name_the_commands_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = poolshift(["completions", shell]).expect_code(0).stdout;
        assert!(COMMANDS.iter().all(|command| script.contains(command)), "{shell}");
    }
}

#[test]
fn an_empty_environment_variable_is_none() {
    let output = binary()
        .env("CEPH_CONF", "")
        .env("POOLSHIFT_CEPH_USER", "")
        .args(["completions", "bash"])
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = binary()
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the binary ends");
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
}

#[test]
fn the_readme_lists_the_exit_codes_of_the_help() {
    let help = poolshift(["--help"]).expect_code(0).stdout;
    let readme = include_str!("../../README.md");
    let codes: Vec<&str> = help.lines().skip_while(|line| *line != "Exit codes:").skip(1).collect();
    assert!(codes.len() > 10, "{help}");
    for line in codes {
        let (code, meaning) = line.trim().split_once("  ").expect("a code and what it means");
        let row = format!("| {code} | {meaning} |");
        assert!(readme.contains(&row), "the README lacks: {row}");
    }
}
