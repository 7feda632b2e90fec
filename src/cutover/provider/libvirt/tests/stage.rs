//! A stand-in with a libvirt of shell: every call of virsh fails once, before its effect and after it, and what was begun
//! is removed.

use crate::cutover::provider::libvirt::Libvirt;
use crate::cutover::provider::rehearse::{Judgement, Rehearse as _, StandIn};
use crate::cutover::provider::{ProviderError, ServerDisk};
use crate::plan::{LibvirtCutover, LibvirtRehearsal, Method};

struct Stage {
    folder: tempfile::TempDir,
    stand_in: StandIn,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cutover/provider/libvirt/tests/virsh-stage");
        std::os::unix::fs::symlink(script, folder.path().join("virsh")).unwrap();
        std::fs::write(folder.path().join("agent"), "").unwrap();
        let name = "vm.poolshift-rehearsal".to_owned();
        let disks = vec![disk("rbd:sas/vm.poolshift-rehearsal")];
        Self { folder, stand_in: StandIn { name, id: "17".into(), server: "web".into(), disks } }
    }

    fn provider(&self, rehearsal: LibvirtRehearsal) -> Libvirt {
        let config = LibvirtCutover {
            domain: "vm".into(),
            uri: None,
            method: Method::Warm,
            save_folder: self.folder.path().to_owned(),
            limit: std::time::Duration::from_secs(1),
            rehearsal,
        };
        let mut provider = Libvirt::new(vec![disk("rbd:sas/vm")], config, None);
        provider.virsh.program = self.folder.path().join("virsh");
        provider
    }

    async fn play(&self, rehearsal: LibvirtRehearsal) -> Result<Judgement, ProviderError> {
        let provider = self.provider(rehearsal);
        provider.stage(&self.stand_in).await?;
        provider.judge(&self.stand_in).await
    }

    fn has(&self, file: &str) -> bool {
        self.folder.path().join(file).exists()
    }

    async fn strike(&self, case: &str) {
        let provider = self.provider(LibvirtRehearsal::default());
        // Again, where the call that fails is one of its own.
        if provider.strike(&self.stand_in).await.is_err() {
            provider.strike(&self.stand_in).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        }
        assert!(!self.has("state") && !self.has("vm.poolshift-rehearsal.17.console"), "{case}");
    }
}

fn disk(target: &str) -> ServerDisk {
    ServerDisk {
        target_in_use: None,
        volume: "vm".into(),
        source: "rbd:sata/vm".parse().unwrap(),
        target: target.parse().unwrap(),
        boot: true,
    }
}

#[tokio::test]
async fn a_stand_in_is_removed_whatever_call_fails() {
    for when in ["before", "after"] {
        let mut calls = 0;
        loop {
            let stage = Stage::new();
            std::fs::write(stage.folder.path().join("fail"), format!("{calls} {when}\n")).unwrap();
            let played = stage.play(LibvirtRehearsal::default()).await;
            let case = format!("call {calls} failed {when} its effect: {played:?}");
            let through = stage.has("fail");
            assert!(!through || played.is_ok(), "{case}");
            stage.strike(&case).await;
            // All of it, the removal too, was through with fewer calls.
            if through && stage.has("fail") {
                assert!(calls > 8, "{case}");
                break;
            }
            calls += 1;
        }
    }
}

#[tokio::test]
async fn a_stand_in_is_judged_by_its_agent_its_console_or_a_command() {
    let stage = Stage::new();
    let judged = async |console: Option<&str>, check: Option<&str>| {
        let own = |text: Option<&str>| text.map(str::to_owned);
        let provider = stage.provider(LibvirtRehearsal { console: own(console), check: own(check), network: None });
        match provider.judge(&stage.stand_in).await.unwrap() {
            Judgement::Well(found) => Ok(found),
            Judgement::NotWell(problem) => Err(problem),
            Judgement::Unknown => panic!("there is somebody to ask"),
        }
    };
    stage.provider(LibvirtRehearsal::default()).stage(&stage.stand_in).await.unwrap();
    let found = judged(None, None).await.unwrap();
    assert!(found.starts_with("its agent answered after"), "{found}");
    std::fs::remove_file(stage.folder.path().join("agent")).unwrap();
    let silent = judged(None, None).await.unwrap_err();
    assert!(
        silent.starts_with("it did not come up within 1s") && silent.ends_with("console shows nothing"),
        "{silent}"
    );
    let check =
        "echo \"$POOLSHIFT_STEP $POOLSHIFT_SERVER $POOLSHIFT_DOMAIN $POOLSHIFT_DISKS\"; echo x >\"$POOLSHIFT_CONSOLE\"";
    let found = judged(None, Some(check)).await.unwrap();
    assert!(found.starts_with("check web vm.poolshift-rehearsal [{"), "{found}");
    let failed = judged(None, Some("echo why >&2; exit 4")).await.unwrap_err();
    assert!(failed.ends_with("failed (exit status: 4): why"), "{failed}");
    let both = judged(Some("x"), Some("echo all is there")).await.unwrap();
    assert!(both.starts_with("its console showed \"x\" after") && both.ends_with("; all is there"), "{both}");
    let never = judged(Some("login:"), None).await.unwrap_err();
    assert!(never.contains("its console ends: x"), "{never}");
    let off = judged(None, Some("echo 'shut off' >\"$(dirname \"$POOLSHIFT_CONSOLE\")/state\"")).await.unwrap_err();
    assert!(off.contains("it is off in the end"), "{off}");
    let ended = judged(Some("login:"), None).await.unwrap_err();
    assert!(ended.starts_with("it is off after") && ended.contains("did not come up"), "{ended}");
    stage.strike("at the end").await;
    stage.strike("once more, with nothing there").await;
    let log = std::fs::read_to_string(stage.folder.path().join("definition")).unwrap();
    assert!(log.contains("name='sas/vm.poolshift-rehearsal'") && !log.contains("sata/vm"), "{log}");
}

#[tokio::test]
async fn a_domain_of_that_name_that_is_not_its_own_is_left_alone() {
    let stage = Stage::new();
    let provider = stage.provider(LibvirtRehearsal::default());
    provider.stage(&stage.stand_in).await.unwrap();
    let other = StandIn { id: "18".into(), ..stage.stand_in.clone() };
    assert_eq!(provider.staged(&other).await.unwrap().unwrap().id.as_deref(), Some("17"));
    provider.stage(&other).await.unwrap_err();
    provider.strike(&other).await.unwrap();
    assert!(stage.has("state") && stage.has("vm.poolshift-rehearsal.17.console"));
    let found = provider.rehearsal_preconditions(&other).await;
    assert!(found.iter().any(|found| found.found.contains("of rehearsal 17, whose clones are gone")), "{found:?}");
    std::fs::write(stage.folder.path().join("definition"), "<domain><name>mine</name></domain>").unwrap();
    provider.strike(&stage.stand_in).await.unwrap();
    assert!(stage.has("state"));
    let found = provider.rehearsal_preconditions(&stage.stand_in).await;
    assert!(found.iter().any(|found| found.found.contains("which poolshift has not made")), "{found:?}");
}
