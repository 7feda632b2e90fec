//! Commands that work, fail, hang and talk nonsense.

use std::path::Path;

use super::*;

/// Commands that keep the server's state in a file, and a log of what they were told.
fn commands(folder: &Path) -> CommandCutover {
    let at = folder.display();
    let log = format!("cd {at}; echo $POOLSHIFT_STEP ${{POOLSHIFT_SIDE-none}} ${{POOLSHIFT_FRESH-none}} >> log;");
    std::fs::write(folder.join("state"), "running source\n").unwrap();
    CommandCutover {
        quiesce: Some(format!("{log} true")),
        stop: format!("{log} read -r power side < state; (sleep 0.7; echo off $side > state) >/dev/null 2>&1 &"),
        swap: format!("{log} echo off $POOLSHIFT_SIDE > state"),
        start: format!("{log} echo running $POOLSHIFT_SIDE > state"),
        undo: None,
        state: format!("cat {at}/state"),
        rehearse: Some(format!("{log} printf %s \"$POOLSHIFT_DISKS\" > {at}/disks")),
        limit: Duration::from_secs(20),
    }
}

fn provider(commands: CommandCutover) -> Commands {
    let disk = ServerDisk {
        target_in_use: None,
        volume: "root".into(),
        source: "rbd:sata/web".parse().unwrap(),
        target: "rbd:sas/ns/web".parse().unwrap(),
        boot: true,
    };
    Commands::new("web", vec![disk], commands)
}

fn log(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn the_commands_are_told_what_to_do_and_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let provider = provider(commands(folder.path()));
    let mut notes = Notes::new();
    let found = provider.preconditions(Side::Source).await;
    assert_eq!((found[0].verdict, found[0].found.as_str()), (Verdict::Ok, "running source"));
    assert_eq!(provider.preconditions(Side::Target).await[0].verdict, Verdict::Error);
    provider.prepare(Side::Source, &mut notes).await.unwrap();
    provider.quiesce(&mut notes).await.unwrap();
    let off = Observed { power: Power::Off, side: Some(Side::Source) };
    assert_eq!(provider.observe(&notes).await.unwrap(), off, "it was waited for");
    assert_eq!(provider.preconditions(Side::Source).await[0].verdict, Verdict::Warning);
    for _ in 0..2 {
        provider.swap(Side::Target, &mut notes).await.unwrap();
        provider.start(Side::Target, false, &mut notes).await.unwrap();
    }
    let running = Observed { power: Power::Running, side: Some(Side::Target) };
    assert_eq!(provider.observe(&notes).await.unwrap(), running);
    let walk = ["quiesce none none", "stop none none", "swap target none", "start target 0"];
    assert_eq!(log(folder.path())[..4], walk);
    provider.undo(Side::Source, true, &mut notes).await.unwrap();
    assert_eq!(log(folder.path())[6..], ["swap source none", "start source 1"]);
    assert!(provider.settle(Side::Source, &mut notes).await.unwrap().is_empty());

    let stand_in = StandIn { name: "w".into(), id: "1".into(), server: "w".into(), disks: provider.disks.clone() };
    let well = Judgement::Well("its command said so".into());
    assert_eq!(provider.judge(&stand_in).await.unwrap(), well);
    let disks: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("disks")).unwrap()).unwrap();
    let expected = json!([{"volume": "root", "boot": true, "source": "rbd:sata/web", "target": "rbd:sas/ns/web"}]);
    assert_eq!(disks, expected);
}

#[tokio::test]
async fn a_server_that_was_never_stopped_is_only_told_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut commands = commands(folder.path());
    commands.stop = "echo it says no >&2; exit 4".into();
    let stubborn = provider(commands.clone());
    let error = stubborn.quiesce(&mut Notes::new()).await.unwrap_err();
    assert!(error.problem.contains("exit status: 4") && error.problem.ends_with("it says no"), "{error}");
    assert_eq!((error.operation.as_str(), error.server.as_str()), ("stop", "server web"));
    stubborn.undo(Side::Source, false, &mut Notes::new()).await.unwrap();
    assert_eq!(log(folder.path()), ["quiesce none none", "start source 0"]);

    commands.undo = Some(commands.start.clone());
    provider(commands).undo(Side::Source, false, &mut Notes::new()).await.unwrap();
    assert_eq!(log(folder.path())[2..], ["undo source 0"]);
}

#[tokio::test]
async fn a_server_that_does_not_stop_or_start_is_an_error_within_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let mut commands = commands(folder.path());
    commands.limit = Duration::from_secs(3);
    commands.stop = "true".into();
    commands.start = "true".into();
    let begun = Instant::now();
    let error = provider(commands.clone()).quiesce(&mut Notes::new()).await.unwrap_err();
    assert!(error.problem.contains("the server is running source, and not stopped"), "{error}");
    let error = provider(commands.clone()).start(Side::Target, false, &mut Notes::new()).await.unwrap_err();
    assert!(error.problem.ends_with("and not running target"), "{error}");
    commands.swap = "sleep 600".into();
    let error = provider(commands).swap(Side::Target, &mut Notes::new()).await.unwrap_err();
    assert_eq!(error.operation, "swap on the target");
    assert!(error.problem.contains("was killed"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn a_state_that_is_none_is_quoted_and_never_believed() {
    let folder = tempfile::tempdir().unwrap();
    let mut commands = commands(folder.path());
    for nonsense in [
        "",
        "running",
        "running source extra",
        "on source",
        "running left",
        " running source",
        "off source\noff source",
    ] {
        std::fs::write(folder.path().join("state"), format!("{nonsense}\n")).unwrap();
        let error = provider(commands.clone()).observe(&Notes::new()).await.unwrap_err();
        assert!(error.problem.contains("printed"), "{nonsense:?}: {error}");
    }
    commands.state = "head -c 5000000 /dev/zero | tr '\\0' x".into();
    let error = provider(commands.clone()).observe(&Notes::new()).await.unwrap_err();
    assert!(error.to_string().len() < 1000);
    commands.state = "echo saved unknown".into();
    let observed = provider(commands).observe(&Notes::new()).await.unwrap();
    assert_eq!(observed, Observed { power: Power::Saved, side: None });
}
