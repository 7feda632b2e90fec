//! A server that a person stops and starts: poolshift carries the last changes over, proves the copy, and says what to
//! swap.

use async_trait::async_trait;

use super::rehearse::Rehearse;
use super::{Notes, Observed, Power, Precondition, Provider, ProviderError, ServerDisk, Side, Verdict};

/// Nobody to ask and nobody to tell.
#[derive(Debug)]
pub struct ByHand {
    server: String,
    disks: Vec<ServerDisk>,
}

impl ByHand {
    /// The server of that name, with its disks.
    pub fn new(server: impl Into<String>, disks: Vec<ServerDisk>) -> Self {
        Self { server: server.into(), disks }
    }
}

impl Rehearse for ByHand {}

#[async_trait]
impl Provider for ByHand {
    fn describe(&self) -> String {
        "a person".into()
    }

    fn by_hand(&self) -> bool {
        true
    }

    async fn preconditions(&self, _from: Side) -> Vec<Precondition> {
        let found = "the plan says nothing about its cutover: stop it by hand when you are asked to";
        vec![Precondition::new(format!("server {}", self.server), Verdict::Warning, found)]
    }

    /// Nobody can tell, so it must be taken to run: only the watchers of its images say that it does not.
    async fn observe(&self, _notes: &Notes) -> Result<Observed, ProviderError> {
        Ok(Observed { power: Power::Running, side: None })
    }

    async fn prepare(&self, _from: Side, _notes: &mut Notes) -> Result<(), ProviderError> {
        Ok(())
    }

    async fn quiesce(&self, _notes: &mut Notes) -> Result<(), ProviderError> {
        Ok(())
    }

    async fn swap(&self, _to: Side, _notes: &mut Notes) -> Result<(), ProviderError> {
        Ok(())
    }

    async fn start(&self, _on: Side, _fresh: bool, _notes: &mut Notes) -> Result<(), ProviderError> {
        Ok(())
    }

    async fn settle(&self, on: Side, _notes: &mut Notes) -> Result<Vec<String>, ProviderError> {
        let swap = self.disks.iter().map(|disk| {
            let boot = if disk.boot { ", which it boots from" } else { "" };
            format!("give {} its disk {}{boot}: {} → {}", self.server, disk.volume, disk.on(on.other()), disk.on(on))
        });
        Ok(swap.chain([format!("then start {}", self.server)]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_person_is_told_what_to_swap() {
        let disk = |volume: &str, boot| ServerDisk {
            target_in_use: None,
            volume: volume.into(),
            source: format!("rbd:sata/{volume}").parse().unwrap(),
            target: format!("rbd:sas/{volume}").parse().unwrap(),
            boot,
        };
        let provider = ByHand::new("web", vec![disk("root", true), disk("data", false)]);
        assert!(provider.by_hand());
        let told = provider.settle(Side::Target, &mut Notes::new()).await.unwrap();
        let expected = [
            "give web its disk root, which it boots from: rbd:sata/root → rbd:sas/root",
            "give web its disk data: rbd:sata/data → rbd:sas/data",
            "then start web",
        ];
        assert_eq!(told, expected);
        let back = provider.settle(Side::Source, &mut Notes::new()).await.unwrap();
        assert!(back[1].ends_with("rbd:sas/data → rbd:sata/data"), "{back:?}");
        let observed = provider.observe(&Notes::new()).await.unwrap();
        assert_eq!(observed, Observed { power: Power::Running, side: None });
    }
}
