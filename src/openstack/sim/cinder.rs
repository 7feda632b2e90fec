//! What Cinder does. The times are those that were seen on Zed, rounded.

use serde_json::{Value, json};

use super::http::{Answer, Call, failure};
use super::state::{State, pool_of};

/// Statuses that may be written by hand.
const STATUSES: [&str; 12] = [
    "creating",
    "available",
    "deleting",
    "error",
    "error_deleting",
    "error_managing",
    "managing",
    "attaching",
    "in-use",
    "detaching",
    "maintenance",
    "reserved",
];

fn no_volume(id: &str) -> Answer {
    failure(404, format!("Volume {id} could not be found."))
}

impl State {
    pub(super) fn cinder(&mut self, call: &Call<'_>) -> Answer {
        match (call.method, call.path.as_slice()) {
            ("GET", ["volumes", id]) => match self.volume(id) {
                Some(volume) => (200, json!({"volume": self.show_volume(volume)})),
                None => no_volume(id),
            },
            ("GET", ["types"]) => {
                let kind = |name: &str| {
                    json!({"id": format!("type-{name}"), "name": name, "qos_specs_id": null,
                           "extra_specs": {"volume_backend_name": name}})
                };
                (200, json!({"volume_types": [kind("sata"), kind("sas")]}))
            }
            ("GET", ["snapshots", "detail"]) => self.snapshots(call.query),
            ("POST", ["snapshots"]) => self.create_snapshot(call.body),
            ("GET", ["attachments", id]) => self.attachment(id),
            ("POST", ["volumes", id, "action"]) => self.act_on_volume(id, call.body),
            _ => failure(404, "Cinder has nothing here"),
        }
    }

    fn snapshots(&self, query: &str) -> Answer {
        let of = query.split('&').find_map(|part| part.strip_prefix("volume_id="));
        let all = self.volumes.iter().filter(|volume| of.is_none_or(|id| id == volume.id)).flat_map(|volume| {
            volume.snapshots.iter().map(|id| json!({"id": id, "volume_id": volume.id, "status": "available"}))
        });
        (200, json!({"snapshots": all.collect::<Vec<_>>()}))
    }

    fn create_snapshot(&mut self, body: &Value) -> Answer {
        let wanted = body["snapshot"]["volume_id"].as_str().unwrap_or_default().to_owned();
        let id = self.new_id(4);
        let Some(volume) = self.volume_mut(&wanted) else { return no_volume(&wanted) };
        if volume.status == "maintenance" {
            let message = "Invalid volume: The snapshot cannot be created when the volume is in maintenance mode.";
            return failure(400, message);
        }
        volume.snapshots.push(id.clone());
        (202, json!({"snapshot": {"id": id, "volume_id": wanted, "status": "creating"}}))
    }

    fn attachment(&self, id: &str) -> Answer {
        let all = self.volumes.iter().flat_map(|volume| volume.records.iter().map(move |record| (volume, record)));
        let Some((volume, record)) = all.into_iter().find(|(_, record)| record.id == id) else {
            return failure(404, format!("Volume attachment could not be found with filter: attachment_id = {id}."));
        };
        let told = record.image.as_ref().map_or_else(|| json!({}), |image| json!({"name": image}));
        let shown = json!({"id": record.id, "status": record.status, "instance": record.server,
                           "volume_id": volume.id, "connection_info": told});
        (200, json!({"attachment": shown}))
    }

    fn act_on_volume(&mut self, id: &str, body: &Value) -> Answer {
        if self.volume(id).is_none() {
            return no_volume(id);
        }
        if let Some(wanted) = body.get("os-reset_status") {
            return self.reset_status(id, wanted);
        }
        match body.get("os-retype") {
            Some(wanted) => self.retype(id, wanted),
            None => failure(400, "There is no such action"),
        }
    }

    fn reset_status(&mut self, id: &str, wanted: &Value) -> Answer {
        let Some(volume) = self.volume_mut(id) else { return no_volume(id) };
        if let Some(status) = wanted["status"].as_str() {
            if !STATUSES.contains(&status) {
                return failure(400, format!("Volume status: {status} is invalid"));
            }
            if status == "in-use" && !volume.records.iter().any(|record| record.status == "attached") {
                let message = "Cannot reset-state to in-use because volume does not have any attachments.";
                return failure(400, message);
            }
            status.clone_into(&mut volume.status);
        }
        if wanted["migration_status"] == "none" {
            volume.migration = None;
        }
        (202, Value::Null)
    }

    fn retype(&mut self, id: &str, wanted: &Value) -> Answer {
        let new_type = wanted["new_type"].as_str().unwrap_or_default().to_owned();
        let on_demand = wanted["migration_policy"] == "on-demand";
        let Some(to) = pool_of(&new_type) else {
            return failure(404, format!("Volume type with name {new_type} could not be found."));
        };
        let Some(volume) = self.volume_mut(id) else { return no_volume(id) };
        let before = volume.status.clone();
        if !["available", "in-use"].contains(&before.as_str()) || volume.volume_type == new_type {
            return failure(400, "Invalid volume: Retype needs volume to be in available or in-use state");
        }
        volume.status = "retyping".into();
        let id = id.to_owned();
        self.after(100, move |state| {
            let running = state.servers.iter().any(|server| server.open.iter().any(|(opened, _)| *opened == id));
            if running && on_demand {
                state.violate(format!("Cinder is asked to move volume {id} below a server that runs"));
            }
            let Some(volume) = state.volume_mut(&id) else { return };
            let stays = volume.pool == to;
            if stays || !on_demand || !volume.snapshots.is_empty() {
                if stays {
                    volume.volume_type = new_type;
                }
                volume.status = before;
                return;
            }
            volume.migration = Some("migrating".into());
            state.after(200, move |state| state.migrate(&id, &new_type, to, before));
        });
        (202, Value::Null)
    }

    /// The driver copies the image to the other pool, and removes it where it was.
    fn migrate(&mut self, id: &str, new_type: &str, to: &'static str, before: String) {
        let Some((name, from)) = self.volume(id).map(|volume| (volume.image(), volume.pool.clone())) else { return };
        let fail = |state: &mut Self| {
            if let Some(volume) = state.volume_mut(id) {
                (volume.status, volume.migration) = (before.clone(), Some("error".into()));
            }
        };
        if self.pools.remove(to, &name) {
            self.violate(format!("Cinder deletes {to}/{name}, as its migration fails"));
            return fail(self);
        }
        let Some(image) = self.pools.find(&from, &name) else { return fail(self) };
        if !image.is_placeholder() {
            self.violate(format!("Cinder moves {from}/{name}, which is no placeholder"));
        }
        self.pools.add(to, image.copied());
        let (id, new_type) = (id.to_owned(), new_type.to_owned());
        self.after(250, move |state| {
            if let Some(volume) = state.volume_mut(&id) {
                (volume.status, volume.migration) = (before, Some("success".into()));
                (volume.volume_type, volume.pool) = (new_type, to.to_owned());
            }
            // It says that it is done before it has removed the old one.
            state.after(40, move |state| {
                if state.pools.find(&from, &name).is_some_and(|there| there.is_same(&image)) {
                    state.pools.remove(&from, &name);
                }
            });
        });
    }
}
