//! `poolshift deps` and `poolshift flatten`, as a user runs them.

use serde_json::Value;

use super::Family;
use crate::support::{Run, binary};

impl Family {
    /// Runs poolshift, whose exit code must be `code`; `NAME` stands for the family's name.
    #[track_caller]
    pub(super) fn run(&self, code: i32, line: &str) -> Run {
        let output = binary()
            .args(self.args(line))
            .env("CEPH_CONF", &self.env.conf)
            .env("POOLSHIFT_CEPH_USER", &self.env.user)
            .output()
            .expect("the binary starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }.expect_code(code)
    }

    #[track_caller]
    fn json(&self, line: &str) -> Value {
        let run = self.run(0, line);
        serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {}", run.stdout))
    }
}

#[test]
#[ignore = "needs Ceph"]
fn a_source_is_freed_of_its_clones() {
    let family = Family::new();
    family.parent_and_clone();
    family.rbd("snap create --no-progress sata/NAME-c@t");
    family.clone("sata/NAME-c@t", "sas/NAME-e");
    let contents = ["sata/NAME-c", "sas/NAME-e"].map(|image| family.content(image));

    let text = family.run(0, "deps rbd:sata/NAME").stdout;
    let end = format!("flattening copies at most 32.0 MiB\n  1. flatten (or remove) rbd:sas/{}-e\n", family.name);
    assert!(text.contains(&end.replace("MiB\n", "MiB\nbefore it can be removed, in this order:\n")), "{text}");
    let json = family.json("deps rbd:sata/NAME --json");
    let clone = &json["snapshots"][0]["clones"][0];
    assert_eq!(clone["image"]["image"], format!("{}-c", family.name));
    assert_eq!((&clone["flatten"]["bytes_at_most"], &clone["own_bytes"]), (&Value::from(32 << 20), &Value::from(0)));
    assert_eq!((&json["parents"], &json["flatten"]), (&Value::Array(vec![]), &Value::Null));
    let actions: Vec<_> = json["removal"].as_array().unwrap().iter().map(|step| step["action"].clone()).collect();
    assert_eq!(actions, ["flatten", "flatten", "remove-snapshot", "remove-image"]);

    let planned = family.json("flatten rbd:sata/NAME --children --dry-run --json");
    assert_eq!(planned.as_array().unwrap().len(), 2, "{planned}");
    family.run(5, "flatten rbd:sata/NAME --children --snapshot none");
    let refused = family.run(9, "flatten rbd:sata/NAME");
    assert!(refused.stderr.contains("--children"), "{refused:?}");

    let done = family.json("flatten rbd:sata/NAME --children --snapshot s --json --yes");
    let image = |index: usize| done[index]["image"]["image"].as_str().unwrap().chars().last();
    assert_eq!((image(0), image(1), &done[1]["done"]), (Some('e'), Some('c'), &Value::Bool(true)));
    assert_eq!(["sata/NAME-c", "sas/NAME-e"].map(|image| family.content(image)), contents);
    assert_eq!(family.json("flatten rbd:sata/NAME --children --dry-run --json"), Value::Array(vec![]));
    assert!(family.run(0, "flatten rbd:sata/NAME --children").stdout.contains("no clones"));
    family.rbd("snap rm --no-progress sata/NAME@s");
    family.rbd("rm --no-progress sata/NAME");
}

#[test]
#[ignore = "needs Ceph"]
fn a_clone_is_flattened_by_itself_at_a_rate() {
    let family = Family::new();
    family.parent_and_clone();
    let chain = family.json("deps rbd:sata/NAME-c --json");
    assert_eq!((&chain["parents"][0]["snapshot"], &chain["parents"][1]), (&Value::from("s"), &Value::Null));
    family.run(0, "flatten rbd:sata/NAME-c --rate 32M");
    assert_eq!(family.json("deps rbd:sata/NAME-c --json")["parents"], Value::Array(vec![]));
}
