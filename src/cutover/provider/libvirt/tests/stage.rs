//! A stand-in with a libvirt of shell: every call of virsh fails once, before its effect and after it, and what was begun
//! is removed.

use crate::cutover::provider::libvirt::Libvirt;
use crate::cutover::provider::rehearse::{Rehearse as _, StandIn};
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
        Self { folder, stand_in: StandIn { name, server: "web".into(), disks } }
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

    async fn play(&self, rehearsal: LibvirtRehearsal) -> Result<Option<String>, ProviderError> {
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
        assert!(!self.has("state") && !self.has("vm.poolshift-rehearsal.console"), "{case}");
    }
}

fn disk(target: &str) -> ServerDisk {
    ServerDisk {
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
    let judged = |console: Option<&str>, check: Option<&str>| {
        let own = |text: Option<&str>| text.map(str::to_owned);
        stage.play(LibvirtRehearsal { console: own(console), check: own(check), network: None })
    };
    let found = judged(None, None).await.unwrap().unwrap();
    assert!(found.starts_with("its agent answered after"), "{found}");
    std::fs::remove_file(stage.folder.path().join("agent")).unwrap();
    let silent = judged(None, None).await.unwrap_err();
    assert!(silent.to_string().contains("did not come up within 1s; its console shows nothing"), "{silent}");
    let check =
        "echo \"$POOLSHIFT_STEP $POOLSHIFT_SERVER $POOLSHIFT_DOMAIN $POOLSHIFT_DISKS\"; echo x >\"$POOLSHIFT_CONSOLE\"";
    let found = judged(None, Some(check)).await.unwrap().unwrap();
    assert!(found.starts_with("check web vm.poolshift-rehearsal [{"), "{found}");
    let failed = judged(None, Some("echo why >&2; exit 4")).await.unwrap_err().to_string();
    assert!(failed.ends_with("failed (exit status: 4): why"), "{failed}");
    let off = judged(None, Some("echo 'shut off' >\"$(dirname \"$POOLSHIFT_CONSOLE\")/state\"")).await.unwrap_err();
    assert!(off.to_string().contains("it is off in the end"), "{off}");
    let never = judged(Some("login:"), None).await.unwrap_err();
    assert!(never.to_string().contains("did not come up within 1s"), "{never}");
    stage.strike("at the end").await;
    stage.strike("once more, with nothing there").await;
    let log = std::fs::read_to_string(stage.folder.path().join("definition")).unwrap();
    assert!(log.contains("name='sas/vm.poolshift-rehearsal'") && !log.contains("sata/vm"), "{log}");
}
