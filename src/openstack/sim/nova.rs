//! What Nova does. The times are those that were seen on Zed, rounded.

use serde_json::{Value, json};

use super::http::{Answer, Call, failure};
use super::state::{Mapping, Record, Server, State, device};

/// How long a guest takes to shut down, and to boot, in milliseconds.
const STOPS: u64 = 500;
const BOOTS: u64 = 2000;

fn no_server(id: &str) -> Answer {
    failure(404, format!("Instance {id} could not be found."))
}

/// A server in a state in which it is not to be asked for that.
fn conflict(word: &str, server: &Server) -> Answer {
    let (id, state) = (&server.id, server.status.to_lowercase());
    failure(409, format!("Cannot '{word}' instance {id} while it is in vm_state {state}"))
}

impl State {
    pub(super) fn nova(&mut self, call: &Call<'_>) -> Answer {
        let Some(id) = call.path.get(1).map(|id| (*id).to_owned()).filter(|_| call.path[0] == "servers") else {
            return failure(404, "Nova has nothing here");
        };
        let Some(server) = self.server(&id) else { return no_server(&id) };
        match (call.method, &call.path[2..]) {
            ("GET", []) => (200, json!({"server": self.show_server(server)})),
            ("GET", ["os-volume_attachments"]) => {
                let all = server.mappings.iter().map(|Mapping { volume, device, delete_on_termination }| {
                    json!({"id": volume, "volumeId": volume, "serverId": id, "device": device, "tag": null,
                           "delete_on_termination": delete_on_termination})
                });
                (200, json!({"volumeAttachments": all.collect::<Vec<_>>()}))
            }
            ("POST", ["action"]) => self.act_on_server(&id, call.body),
            ("POST", ["os-volume_attachments"]) => self.attach(&id, &call.body["volumeAttachment"]),
            ("DELETE", ["os-volume_attachments", volume]) => self.detach(&id, volume),
            _ => failure(404, "Nova has nothing here"),
        }
    }

    fn act_on_server(&mut self, id: &str, body: &Value) -> Answer {
        let action = body.as_object().and_then(|body| body.keys().next().cloned()).unwrap_or_default();
        let Some(server) = self.server_mut(id) else { return no_server(id) };
        let idle = server.task.is_none();
        match (action.as_str(), server.status) {
            ("lock", _) => server.locked = Some(body["lock"]["locked_reason"].as_str().map(str::to_owned)),
            ("unlock", _) => server.locked = None,
            ("shelve", "ACTIVE" | "SHUTOFF") if idle => self.shelve(id),
            ("unshelve", "SHELVED_OFFLOADED") if idle => self.unshelve(id),
            ("os-stop", "ACTIVE") if idle => self.stop(id),
            ("os-start", "SHUTOFF") if idle => self.start(id),
            (word @ ("shelve" | "unshelve" | "os-stop" | "os-start"), _) => {
                return conflict(word.trim_start_matches("os-"), server);
            }
            _ => return failure(400, format!("There is no such action: {action}")),
        }
        (202, Value::Null)
    }

    fn set(&mut self, id: &str, change: impl FnOnce(&mut Server)) {
        if let Some(server) = self.server_mut(id) {
            change(server);
        }
    }

    fn volumes_of(&self, id: &str) -> Vec<String> {
        self.server(id).map(|server| server.mappings.iter().map(|one| one.volume.clone()).collect()).unwrap_or_default()
    }

    /// Shuts it down, has Cinder keep its volumes for it, and takes it from its host; then forgets the host.
    fn shelve(&mut self, id: &str) {
        self.set(id, |server| server.task = Some("shelving"));
        let id = id.to_owned();
        self.after(STOPS, move |state| {
            state.close_all(&id);
            if state.shelves_to_fail > 0 {
                state.shelves_to_fail -= 1;
                return state.set(&id, |server| server.task = None);
            }
            let volumes = state.volumes_of(&id);
            let mut later = 300;
            for volume in volumes {
                let server = id.clone();
                state.after(later, move |state| state.keep(&server, &volume));
                later += 300;
            }
            state.after(later, move |state| {
                state.set(&id, |server| {
                    (server.status, server.task, server.power) = ("SHELVED_OFFLOADED", None, 4);
                });
                state.after(200, move |state| state.set(&id, |server| server.host = None));
            });
        });
    }

    /// Replaces a server's attachment of a volume by one that is reserved for it.
    fn keep(&mut self, server: &str, volume: &str) {
        let id = self.new_id(3);
        let Some(volume) = self.volume_mut(volume) else { return };
        if !["in-use", "reserved"].contains(&volume.status.as_str()) {
            let what = format!("Nova can't keep volume {} for server {server}: it is {}", volume.id, volume.status);
            return self.violate(what);
        }
        for record in volume.records.iter_mut().filter(|record| record.server == server) {
            *record = Record { id: id.clone(), status: "reserved", image: None, ..record.clone() };
        }
        volume.status = "reserved".into();
    }

    /// Builds it anew on its host: it is told anew how to reach its volumes.
    fn unshelve(&mut self, id: &str) {
        if self.server(id).is_some_and(|server| server.host.is_some()) {
            self.violate(format!("server {id} is unshelved before Nova has forgotten its host"));
        }
        self.set(id, |server| server.task = Some("unshelving"));
        let id = id.to_owned();
        self.after(600, move |state| {
            state.set(&id, |server| server.task = Some("spawning"));
            let volumes = state.volumes_of(&id);
            let mut later = 100;
            for volume in volumes {
                let server = id.clone();
                state.after(later, move |state| state.connect(&server, &volume));
                later += 400;
            }
            state.after(later + BOOTS, move |state| state.boot(&id, "SHELVED_OFFLOADED"));
        });
    }

    /// Cinder tells a server where a volume's image is, and says that the server has it.
    fn connect(&mut self, server: &str, volume: &str) {
        let told = self.volume(volume).map(|volume| format!("{}/{}", volume.pool, volume.image()));
        let Some(found) = self.volume_mut(volume) else { return };
        if let Some(record) = found.records.iter_mut().find(|record| record.server == server) {
            (record.status, record.image) = ("attaching", told);
        }
        found.status = "attaching".into();
        let (server, volume) = (server.to_owned(), volume.to_owned());
        self.after(200, move |state| {
            let Some(found) = state.volume_mut(&volume) else { return };
            if let Some(record) = found.records.iter_mut().find(|record| record.server == server) {
                record.status = "attached";
            }
            found.status = "in-use".into();
        });
    }

    /// Its guest opens all of its images and runs; where one is missing, it is what it was.
    fn boot(&mut self, id: &str, otherwise: &'static str) {
        let volumes = self.volumes_of(id);
        let opened: Vec<bool> = volumes.iter().map(|volume| self.open(id, volume)).collect();
        if opened.contains(&false) {
            self.close_all(id);
            self.set(id, |server| {
                (server.status, server.task, server.power) = (otherwise, None, 4);
                server.fault = Some("error opening image: No such file or directory".into());
            });
            if otherwise == "SHELVED_OFFLOADED" {
                volumes.iter().for_each(|volume| self.keep(id, volume));
            }
            return;
        }
        self.set(id, |server| {
            (server.status, server.task, server.power, server.host) = ("ACTIVE", None, 1, Some("vm"));
            server.fault = None;
        });
        self.write();
    }

    fn stop(&mut self, id: &str) {
        self.set(id, |server| server.task = Some("powering-off"));
        let id = id.to_owned();
        self.after(STOPS, move |state| {
            state.close_all(&id);
            state.set(&id, |server| (server.status, server.task, server.power) = ("SHUTOFF", None, 4));
        });
    }

    /// It starts from the images that it was told of before.
    fn start(&mut self, id: &str) {
        self.set(id, |server| server.task = Some("powering-on"));
        let id = id.to_owned();
        self.after(BOOTS, move |state| state.boot(&id, "SHUTOFF"));
    }

    fn detach(&mut self, id: &str, volume: &str) -> Answer {
        let Some(server) = self.server(id) else { return no_server(id) };
        let Some(at) = server.mappings.iter().position(|one| one.volume == volume) else {
            return match self.volume(volume) {
                Some(_) => failure(404, format!("Instance {id} is not attached to volume {volume}")),
                None => failure(404, format!("Volume {volume} could not be found.")),
            };
        };
        if at == 0 && server.mappings[at].device == device(0) {
            return failure(400, "Cannot detach a root device volume");
        }
        let Some(found) = self.volume_mut(volume) else { return no_server(id) };
        if found.status != "in-use" {
            return failure(400, "Invalid volume: Unable to detach volume. Volume status must be 'in-use'");
        }
        found.status = "detaching".into();
        let (id, volume) = (id.to_owned(), volume.to_owned());
        self.after(450, move |state| {
            state.close(&id, &volume);
            let lag = state.lag;
            if let Some(found) = state.volume_mut(&volume) {
                found.records.retain(|record| record.server != id);
                // Somebody else is about to get it, as long as the lag lasts.
                found.status = if lag.is_some() { "reserved".into() } else { "available".into() };
            }
            let milliseconds = lag.map_or(120, |lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX));
            state.after(milliseconds, move |state| {
                if let Some(found) = state.volume_mut(&volume).filter(|found| found.status == "reserved") {
                    found.status = "available".into();
                }
                state.set(&id, |server| server.mappings.retain(|one| one.volume != volume));
            });
        });
        (202, Value::Null)
    }

    fn attach(&mut self, id: &str, wanted: &Value) -> Answer {
        let volume = wanted["volumeId"].as_str().unwrap_or_default().to_owned();
        let record = self.new_id(3);
        let Some(server) = self.server(id) else { return no_server(id) };
        if server.mappings.iter().any(|one| one.volume == volume) {
            let message = format!("Invalid volume: volume {volume} is already attached to instances: {id}");
            return failure(400, message);
        }
        // Whatever name is asked for, libvirt takes the next one that is free.
        let free = (0..).map(device).find(|name| !server.mappings.iter().any(|one| one.device == *name));
        let device = free.unwrap_or_default();
        let Some(found) = self.volume_mut(&volume) else {
            return failure(404, format!("Volume {volume} could not be found."));
        };
        if found.status != "available" {
            let status = &found.status;
            let message = format!("Invalid volume: Volume {volume} status must be available, but is {status}");
            return failure(400, message);
        }
        let status = "reserved";
        found.records.push(Record { id: record, server: id.to_owned(), device: device.clone(), status, image: None });
        let delete_on_termination = wanted["delete_on_termination"] == true;
        let answer = json!({"id": volume, "volumeId": volume, "serverId": id, "device": device, "tag": null,
                            "delete_on_termination": delete_on_termination});
        let mapping = Mapping { volume: volume.clone(), device, delete_on_termination };
        self.set(id, |server| server.mappings.push(mapping));
        let id = id.to_owned();
        self.after(100, move |state| {
            if let Some(found) = state.volume_mut(&volume).filter(|found| found.status == "available") {
                found.status = "reserved".into();
            }
            state.after(900, move |state| {
                state.connect(&id, &volume);
                state.after(150, move |state| {
                    let _ = state.open(&id, &volume);
                });
            });
        });
        (200, json!({"volumeAttachment": answer}))
    }
}
