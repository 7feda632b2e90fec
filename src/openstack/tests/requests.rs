//! Single requests: headers, repetitions, pages, bounds.

use super::*;

const VOLUMES: &str = "/volumes/detail";

fn volume(id: usize) -> Value {
    json!({"id": format!("v{id}"), "size": 1, "status": "available"})
}

#[tokio::test]
async fn each_service_is_told_its_exact_version() {
    let fake = Fake::start(|seen, _, _| match seen.line.as_str() {
        line if line.contains("/volumes/v1") => Some(answer(200, json!({"volume": volume(1)}))),
        line if line.contains("/action") => Some(answer(202, Value::Null)),
        line if line.contains("/projects/") => Some(answer(200, json!({"project": {"id": "p", "name": "n"}}))),
        _ => None,
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    cloud.volume("v1").await.unwrap();
    cloud.act_on_server("s1", ServerAction::Shelve).await.unwrap();
    cloud.retype("v1", "sas", MigrationPolicy::OnDemand).await.unwrap();
    cloud.find_project("p").await.unwrap();
    let told = |part: &str| {
        let seen = fake.seen(part).pop().unwrap();
        (seen.line.clone(), seen.header("OpenStack-API-Version").to_owned(), seen.header("X-Auth-Token").to_owned())
    };
    let (token, cinder, nova) = ("token-0".to_owned(), "volume 3.27".to_owned(), "compute 2.79".to_owned());
    let volume = format!("GET /volume/v3/{PROJECT}/volumes/v1");
    assert_eq!(
        told("/volumes/v1"),
        (format!("POST /volume/v3/{PROJECT}/volumes/v1/action"), cinder.clone(), token.clone())
    );
    assert_eq!(told(&volume), (volume.clone(), cinder, token.clone()));
    assert_eq!(told("/compute/v2.1/servers"), ("POST /compute/v2.1/servers/s1/action".into(), nova, token.clone()));
    assert_eq!(told("/projects/"), ("GET /identity/v3/projects/p".into(), "-".into(), token));
    let bodies: Vec<_> = fake.seen("/action").into_iter().map(|seen| seen.body).collect();
    let retype = json!({"os-retype": {"new_type": "sas", "migration_policy": "on-demand"}});
    assert_eq!(bodies, [json!({"shelve": null}), retype]);
    assert!(fake.seen("/action")[0].header("User-Agent").starts_with("poolshift/"));
}

#[tokio::test]
async fn a_port_is_changed_only_as_it_was_seen() {
    let fake = Fake::start(|seen, before, _| match seen.line.as_str() {
        "GET /network/v2.0/ports/old" => Some(answer(200, json!({"port": {"id": "old"}}))),
        line if line.starts_with("GET /network/v2.0/ports/") => {
            Some(answer(200, json!({"port": {"id": "p", "device_id": "s", "revision_number": 7 + before}})))
        }
        "PUT /network/v2.0/ports/p" if before == 0 => {
            Some(answer(412, json!({"NeutronError": {"type": "RevisionNumberConstraintFailed", "message": "not 7"}})))
        }
        line if line.starts_with("PUT") => Some(answer(200, json!({"port": {"id": "p"}}))),
        _ => None,
    })
    .await;
    let mut access = fake.access();
    access.endpoints.insert("network", format!("{}/network", fake.base()).parse().unwrap());
    let cloud = Cloud::connect(access).await.unwrap();
    let error = cloud.set_port_device(&cloud.port("p").await.unwrap(), "x", None).await.unwrap_err();
    // It is for the caller to look at what it has become.
    assert!(error.fault == Fault::Conflict && error.to_string().contains("not 7"), "{error}");
    cloud.set_port_device(&cloud.port("p").await.unwrap(), "x", None).await.unwrap();
    // Not every cloud counts what becomes of a port.
    cloud.set_port_device(&cloud.port("old").await.unwrap(), "x", None).await.unwrap();
    let told: Vec<_> = fake.seen("PUT ").iter().map(|seen| seen.header("If-Match").to_owned()).collect();
    assert_eq!(told, ["revision_number=7", "revision_number=8", "-"]);
}

#[tokio::test]
async fn a_service_that_has_too_much_to_do_is_asked_again() {
    let fake = Fake::start(|seen, before, _| match seen.line.as_str() {
        line if line.contains("/action") && before < 2 => {
            Some(answer(429, json!({"overLimit": {"message": "slower"}})).header("Retry-After", "0"))
        }
        line if line.contains("/auth/tokens") && before < 4 => {
            Some(answer(429, Value::Null).header("Retry-After", "0"))
        }
        line if line.contains("/action") => Some(answer(202, Value::Null)),
        line if line.contains("/types") => Some(answer(429, Value::Null).header("Retry-After", "0")),
        _ => None,
    })
    .await;
    let begun = std::time::Instant::now();
    let cloud = fake.connect().await.unwrap();
    cloud.act_on_server("s1", ServerAction::Start).await.unwrap();
    assert_eq!((fake.count("/auth/tokens"), fake.count("/action")), (5, 3));
    let error = cloud.volume_types().await.unwrap_err();
    assert_eq!((error.fault, error.is_passing(), fake.count("/types")), (Fault::Busy, true, 5));
    // It waits as long as it was told to, which is not at all; left to itself it would wait for 6.6 s.
    assert!(begun.elapsed() < std::time::Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_look_is_repeated_and_a_change_is_not() {
    let fake = Fake::start(|seen, before, _| {
        let failed = answer(500, json!({"computeFault": {"message": "oh"}})).header("Retry-After", "0");
        match seen.line.as_str() {
            line if line.contains("/servers/detail") && before >= 2 => Some(answer(200, json!({"servers": []}))),
            line if line.contains("/types") || line.contains("/servers") || line.contains("/volumes") => Some(failed),
            _ => None,
        }
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    cloud.servers(&Whose::Own).await.unwrap();
    assert_eq!(fake.count("/servers/detail"), 3);
    assert_eq!((cloud.volume_types().await.unwrap_err().fault, fake.count("/types")), (Fault::Unavailable, 5));
    for outcome in [
        cloud.act_on_server("s1", ServerAction::Stop).await,
        cloud.retype("v1", "sas", MigrationPolicy::Never).await,
        cloud.detach("s1", "v1").await,
    ] {
        let error = outcome.unwrap_err();
        assert_eq!((error.fault, error.is_passing()), (Fault::Unavailable, true));
    }
    let changes = ["POST /compute", "POST /volume", "DELETE /compute"].map(|change| fake.count(change));
    assert_eq!(changes, [1, 1, 1], "each was sent once");
}

/// A service that ends the first `broken` connections without an answer, and answers the others with 202. How many came is
/// counted.
async fn breaking(broken: usize) -> (url::Url, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        loop {
            let (mut connection, _) = listener.accept().await.unwrap();
            let _ = connection.read(&mut [0; 4096]).await;
            // The look at the versions is not what is counted here.
            if counted.fetch_add(1, Ordering::SeqCst) < broken {
                continue;
            }
            let body = "{\"servers\": []}";
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = connection.write_all(format!("{head}{body}").as_bytes()).await;
        }
    });
    (format!("http://{address}/compute/v2.1").parse().unwrap(), count)
}

/// A cloud whose Nova is at that address.
async fn with_nova_at(fake: &Fake, nova: url::Url) -> Cloud {
    let mut access = fake.access();
    access.endpoints.insert("compute", nova);
    Cloud { session: session::Session::new(access).unwrap() }
}

#[tokio::test]
async fn a_connection_that_breaks_is_no_answer() {
    let fake = Fake::start(|_, _, _| None).await;
    let (nova, count) = breaking(2).await;
    let cloud = with_nova_at(&fake, nova).await;
    cloud.servers(&Whose::Own).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 3, "a look is repeated");

    let (nova, count) = breaking(1).await;
    let cloud = with_nova_at(&fake, nova).await;
    let error = cloud.act_on_server("s1", ServerAction::Stop).await.unwrap_err();
    assert_eq!((error.fault, count.load(Ordering::SeqCst)), (Fault::Unavailable, 1), "a change is not: {error}");
    assert!(error.to_string().ends_with("cannot stop server s1: no answer came"), "{error}");
}

#[tokio::test]
async fn where_nobody_listens_nothing_was_sent() {
    let fake = Fake::start(|_, _, _| None).await;
    // Nobody else gets the port meanwhile.
    let silent = tokio::net::TcpSocket::new_v4().unwrap();
    silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let free = silent.local_addr().unwrap();
    let cloud = with_nova_at(&fake, format!("http://{free}/").parse().unwrap()).await;
    let begun = std::time::Instant::now();
    let error = cloud.act_on_server("s1", ServerAction::Stop).await.unwrap_err();
    assert!(error.fault == Fault::Unavailable && error.to_string().contains("there is no connection to it"), "{error}");
    // It has been tried several times: what was never sent may be sent again.
    assert!(begun.elapsed() > std::time::Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn long_lists_come_in_pages() {
    let fake = Fake::start(|seen, _, _| {
        let flavors = |all: Value| Some(answer(200, json!({"flavors": all})));
        let page = match seen.line.as_str() {
            line if line.contains("/flavors?") => {
                return match line {
                    line if line.contains("marker=f2") => flavors(json!([])),
                    line if line.contains("marker=f1") => flavors(json!([{"id": "f2", "name": "tiny"}])),
                    _ => flavors(json!([{"id": "f1", "name": "small"}])),
                };
            }
            line if !line.contains(VOLUMES) => return None,
            line if line.contains("marker=v2") => json!([volume(3)]),
            line if line.contains("marker=v3") => json!([]),
            _ => json!([volume(1), volume(2)]),
        };
        Some(answer(200, json!({"volumes": page})))
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    let ids: Vec<_> = cloud.volumes(&Whose::Own).await.unwrap().into_iter().map(|volume| volume.id).collect();
    assert_eq!(ids, ["v1", "v2", "v3"]);
    let lines: Vec<_> = fake.seen(VOLUMES).into_iter().map(|seen| seen.line).collect();
    let head = format!("GET /volume/v3/{PROJECT}/volumes/detail?limit=500&sort=created_at%3Aasc%2Cid%3Aasc");
    assert_eq!(lines, [head.clone(), format!("{head}&marker=v2"), format!("{head}&marker=v3")]);
    // Whose they are is a part of every page.
    cloud.volumes(&Whose::Project("x".into())).await.unwrap();
    let lines = fake.seen("all_tenants=1&project_id=x");
    assert_eq!(lines.len(), 3, "{lines:?}");
    cloud.volumes(&Whose::All).await.unwrap();
    assert_eq!((fake.count("all_tenants=1"), fake.count("project_id")), (6, 3));
    // A cloud may have more flavors than a page.
    assert_eq!(cloud.find_flavor("tiny").await.unwrap().as_deref(), Some("f2"));
    assert_eq!(cloud.find_flavor("huge").await.unwrap(), None);
}

#[tokio::test]
async fn a_list_whose_last_is_gone_is_begun_anew() {
    for gone in [404, 400] {
        let fake = Fake::start(move |seen, before, _| {
            seen.line.contains(VOLUMES).then(|| match seen.line.as_str() {
                line if line.contains("marker=v2") => answer(gone, json!({"itemNotFound": {"message": "v2 is gone"}})),
                line if line.contains("marker=v1") => answer(200, json!({"volumes": []})),
                _ if before == 0 => answer(200, json!({"volumes": [volume(1), volume(2)]})),
                _ => answer(200, json!({"volumes": [volume(1)]})),
            })
        })
        .await;
        let cloud = fake.connect().await.unwrap();
        let ids: Vec<_> = cloud.volumes(&Whose::Own).await.unwrap().into_iter().map(|volume| volume.id).collect();
        assert_eq!((ids, fake.count(VOLUMES)), (vec!["v1".to_owned()], 4));
    }
    // It is always gone, and what is not there at all is not asked for again.
    let always = Fake::start(|seen, _, _| {
        seen.line.contains(VOLUMES).then(|| match seen.line.contains("marker") {
            true => answer(404, json!({"itemNotFound": {"message": "v1 is gone"}})),
            false => answer(200, json!({"volumes": [volume(1)]})),
        })
    })
    .await;
    let error = always.connect().await.unwrap().volumes(&Whose::Own).await.unwrap_err();
    assert_eq!((error.fault, error.is_passing(), always.count(VOLUMES)), (Fault::Busy, true, 20));
    let none = Fake::start(|_, _, _| None).await;
    let error = none.connect().await.unwrap().volumes(&Whose::Own).await.unwrap_err();
    assert_eq!((error.fault, none.count(VOLUMES)), (Fault::NotFound, 1));
}

#[tokio::test]
async fn a_list_that_never_ends_does() {
    // It does not know of markers.
    let same = Fake::with(VOLUMES, json!({"volumes": [volume(1), volume(2)]})).await;
    let cloud = same.connect().await.unwrap();
    assert_eq!((cloud.volumes(&Whose::Own).await.unwrap().len(), same.count(VOLUMES)), (2, 2));
    // It always has one more.
    let more = Fake::start(|seen, before, _| {
        seen.line.contains(VOLUMES).then(|| answer(200, json!({"volumes": [volume(before)]})))
    })
    .await;
    let error = more.connect().await.unwrap().volumes(&Whose::Own).await.unwrap_err();
    assert_eq!((error.fault, more.count(VOLUMES)), (Fault::Strange, 200));
}

#[tokio::test]
async fn an_answer_without_an_end_is_not_read_to_it() {
    let fake = Fake::start(|seen, _, _| {
        let endless = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 1 << 20]));
        seen.line.contains("/servers/detail").then(|| text(200, axum::body::Body::from_stream(endless)))
    })
    .await;
    let error = fake.connect().await.unwrap().servers(&Whose::Own).await.unwrap_err();
    assert_eq!((error.fault, fake.count("/servers/detail")), (Fault::Strange, 1));
    assert!(error.to_string().ends_with("its answer has more than 67108864 bytes"), "{error}");
}

#[tokio::test]
async fn a_token_goes_nowhere_else() {
    let other = Fake::start(|_, _, _| None).await;
    let elsewhere = format!("{}/servers", other.base());
    let fake = Fake::start(move |seen, _, _| {
        seen.line.contains("/servers").then(|| text(302, "").header("Location", elsewhere.clone()))
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    assert_eq!(cloud.servers(&Whose::Own).await.unwrap_err().fault, Fault::Refused(302));
    assert_eq!(cloud.act_on_server("s", ServerAction::Stop).await.unwrap_err().fault, Fault::Refused(302));
    assert_eq!((fake.count("/servers"), other.count("")), (2, 0));
}

#[tokio::test]
async fn what_a_service_says_is_kept_short_and_plain() {
    for (status, body, fault, said) in [
        (
            400,
            json!({"badRequest": {"message": "no such type", "code": 400}}),
            Fault::Refused(400),
            "it answers 400: no such type",
        ),
        (403, json!({"forbidden": {"message": "Policy doesn't allow"}}), Fault::Forbidden, "403: Policy doesn't allow"),
        (
            403,
            json!({"forbidden": {"message": "Quota exceeded for cores"}}),
            Fault::OverQuota,
            "Quota exceeded for cores",
        ),
        (413, json!({"overLimit": {"message": "VolumeSizeExceeds"}}), Fault::OverQuota, "413: VolumeSizeExceeds"),
        (404, json!({"itemNotFound": {"message": "gone"}}), Fault::NotFound, "404: gone"),
        (406, json!({"choices": []}), Fault::Version, "it answers 406 Not Acceptable"),
        (
            409,
            json!({"conflictingRequest": {"message": "a\u{1b}[31m\nb"}}),
            Fault::Conflict,
            "it answers 409: a [31m b",
        ),
        (409, json!({"message": "flat"}), Fault::Conflict, "it answers 409: flat"),
        (409, json!("text"), Fault::Conflict, "it answers 409 Conflict"),
        (503, json!({"message": "down"}), Fault::Unavailable, "it answers 503: down"),
    ] {
        let fake = Fake::start(move |seen, _, _| {
            let said = answer(status, body.clone()).header("X-Openstack-Request-Id", "req-1 <b>");
            seen.line.contains("/action").then_some(said)
        })
        .await;
        let error = fake.connect().await.unwrap().act_on_server("s1", ServerAction::Stop).await.unwrap_err();
        assert_eq!(error.fault, fault, "{error}");
        assert!(error.to_string().ends_with(&format!("{said} (req-1b)")), "{error}");
        assert!(error.to_string().starts_with("nova at http://127.0.0.1:"), "{error}");
    }
    let long = "x".repeat(100_000);
    let fake = Fake::start(move |seen, _, _| {
        seen.line.contains("/action").then(|| answer(409, json!({"e": {"message": long.clone()}})))
    })
    .await;
    let error = fake.connect().await.unwrap().act_on_server("s1", ServerAction::Stop).await.unwrap_err();
    assert!(error.to_string().len() < 700, "{}", error.to_string().len());
}

#[tokio::test]
async fn what_is_no_id_is_never_a_part_of_a_path() {
    let fake = Fake::start(|_, _, _| None).await;
    let cloud = fake.connect().await.unwrap();
    let before = fake.count("");
    for id in ["", "../servers", "a/b", "a?b", "a#b", "ä", &"a".repeat(65)] {
        for outcome in [
            cloud.volume(id).await.map(drop),
            cloud.server(id).await.map(drop),
            cloud.quotas(id).await.map(drop),
            cloud.is_encrypting(id).await.map(drop),
            cloud.detach("s", id).await,
            cloud.retype(id, "sas", MigrationPolicy::Never).await,
        ] {
            assert_eq!(outcome.unwrap_err().fault, Fault::NotFound, "{id:?}");
        }
    }
    assert_eq!(fake.count(""), before);
}

#[tokio::test]
async fn a_project_is_found_by_its_id_or_its_name() {
    let project = |id: &str, name: &str, domain: &str| json!({"id": id, "name": name, "domain_id": domain});
    let fake = Fake::start(move |seen, _, _| {
        let named = |projects: Value| Some(answer(200, json!({"projects": projects})));
        match seen.line.as_str() {
            "GET /identity/v3/projects/abc" => Some(answer(200, json!({"project": project("abc", "one", "d")}))),
            "GET /identity/v3/projects/secret" => Some(answer(403, json!({"error": {"message": "no"}}))),
            // Keystone may compare without regard to case.
            "GET /identity/v3/projects?name=two" => {
                named(json!([project("id2", "two", "d"), project("id3", "TWO", "d")]))
            }
            "GET /identity/v3/projects?name=both" => {
                named(json!([project("a1", "both", "d"), project("b2", "both", "e")]))
            }
            "GET /identity/v3/projects?name=a%2Fb" => named(json!([project("id4", "a/b", "d")])),
            line if line.contains("projects?name=") => named(json!([])),
            _ => None,
        }
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    assert_eq!(cloud.find_project("abc").await.unwrap().name, "one");
    assert_eq!(cloud.find_project("two").await.unwrap().id, "id2");
    assert_eq!(cloud.find_project("a/b").await.unwrap().id, "id4");
    let error = cloud.find_project("both").await.unwrap_err();
    let hint = error.hint.as_deref().unwrap();
    assert!(error.fault == Fault::Config && hint.contains("a1 of the domain d") && hint.contains("b2 of"), "{hint}");
    assert_eq!(cloud.find_project("nobody").await.unwrap_err().fault, Fault::NotFound);
    assert_eq!(cloud.find_project("secret").await.unwrap_err().fault, Fault::Forbidden);
}

#[tokio::test]
async fn discovery_sees_what_there_is() {
    let fake = Fake::start(|seen, before, _| {
        let first = |body: Value, key: &str| answer(200, if before == 0 { body } else { json!({key: []}) });
        let project = |id: &str| json!({"os-vol-tenant-attr:tenant_id": id, "os-vol-host-attr:host": "h@b#p"});
        let with = |id: usize, extra: Value| {
            let mut volume = volume(id);
            volume.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            volume
        };
        match seen.line.split(['?']).next().unwrap() {
            line if line.ends_with("/servers/detail") => {
                Some(first(json!({"servers": [{"id": "s1", "status": "ACTIVE"}]}), "servers"))
            }
            line if line.ends_with("/volumes/detail") => {
                let volumes = json!([with(1, project("p1")), with(2, project("p2")), with(3, project("p1"))]);
                Some(first(json!({"volumes": volumes}), "volumes"))
            }
            line if line.ends_with("/snapshots/detail") => Some(answer(200, json!({"snapshots": []}))),
            line if line.ends_with("/types") => Some(answer(
                200,
                json!({"volume_types": [
                    {"id": "t1", "name": "sas"}, {"id": "t2", "name": "locked"}, {"id": "t3", "name": "other"},
                ]}),
            )),
            line if line.ends_with("/types/t1/encryption") => Some(answer(200, json!({}))),
            line if line.ends_with("/types/t2/encryption") => Some(answer(200, json!({"provider": "luks"}))),
            line if line.ends_with("/os-quota-sets/p1") => Some(answer(
                200,
                json!({"quota_set": {
                    "id": "p1", "gigabytes_sas": {"limit": 10, "in_use": 4, "reserved": 1, "allocated": 0},
                }}),
            )),
            line if line.ends_with("/os-quota-sets/p2") => Some(answer(403, json!({"forbidden": {"message": "no"}}))),
            _ => None,
        }
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    let world = discovery::look(&cloud, &[Whose::All], &["sas", "locked"]).await.unwrap();
    assert_eq!((world.servers.len(), world.volumes.len(), world.types.len()), (1, 3, 3));
    assert_eq!(world.encrypting, ["t2".to_owned()].into());
    assert_eq!(fake.count("/types/t3"), 0, "nobody has asked for it");
    // A project whose quotas can't be seen keeps nobody.
    assert_eq!(world.quotas.keys().collect::<Vec<_>>(), ["p1"]);
    let quota = world.quotas["p1"]["gigabytes_sas"];
    assert_eq!([quota.has_room(5), quota.has_room(6)], [true, false]);
}

#[tokio::test]
async fn discovery_needs_to_see_where_volumes_are() {
    let fake = Fake::start(|seen, _, _| match seen.line.split('?').next().unwrap() {
        line if line.ends_with("/servers/detail") => Some(answer(200, json!({"servers": []}))),
        line if line.ends_with("/volumes/detail") => Some(answer(200, json!({"volumes": [volume(1)]}))),
        line if line.ends_with("/snapshots/detail") => Some(answer(200, json!({"snapshots": []}))),
        line if line.ends_with("/types") => Some(answer(200, json!({"volume_types": []}))),
        _ => None,
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    let error = discovery::look(&cloud, &[Whose::Own], &[]).await.unwrap_err();
    assert!(error.fault == Fault::Forbidden && error.hint.as_deref().unwrap().contains("role admin"), "{error}");
}

#[tokio::test]
async fn what_is_looked_for_is_what_is_found() {
    let fake = Fake::start(|seen, _, _| {
        let with =
            |id: &str, metadata: Value| json!({"id": id, "name": "n", "size": 1, "status": "x", "metadata": metadata});
        let pool = |name: &str, of: &str| json!({"name": name, "capabilities": {"volume_backend_name": of}});
        Some(match seen.line.as_str() {
            line if line.contains("marker=") => answer(200, json!({"volumes": [], "servers": []})),
            // It may not know of the filter, and answer with everything.
            line if line.contains("/volumes/detail") => {
                let volumes = [with("v1", json!({"k": "1"})), with("v2", json!({"k": "2"})), with("v3", json!({}))];
                answer(200, json!({"volumes": volumes}))
            }
            line if line.contains("/servers/detail") => {
                let server = |id: &str, name: &str| json!({"id": id, "name": name, "status": "ACTIVE"});
                answer(200, json!({"servers": [server("s1", "web.x"), server("s2", "webbx")]}))
            }
            line if line.contains("/get_pools") => {
                answer(200, json!({"pools": [pool("vm@sata#sata", "b"), pool("vm@sas#sas", "a"), {"name": "z"}]}))
            }
            line if line.contains("/servers/s1/action") => answer(200, json!({"output": "login: "})),
            _ => return None,
        })
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    let ids = |volumes: Vec<Volume>| volumes.into_iter().map(|volume| volume.id).collect::<Vec<_>>();
    assert_eq!(ids(cloud.volumes_with("k", "2").await.unwrap()), ["v2"]);
    let line = &fake.seen("metadata=")[0].line;
    assert!(line.contains("metadata=%7B%22k%22%3A%222%22%7D") && line.contains("all_tenants=1"), "{line}");
    assert_eq!(ids(cloud.volumes_named("n").await.unwrap()).len(), 3);
    assert_eq!(ids(cloud.volumes_named("other").await.unwrap()).len(), 0);
    let servers = cloud.servers_named("web.x").await.unwrap();
    assert_eq!(servers.iter().map(|server| server.id.as_str()).collect::<Vec<_>>(), ["s1"]);
    assert!(fake.seen("/servers/detail")[0].line.contains("name=%5Eweb.%2Bx%24"), "{:?}", fake.seen("/servers/detail"));
    let hosts: Vec<_> = cloud.backends().await.unwrap().into_iter().map(|backend| backend.host).collect();
    assert_eq!(hosts, ["vm@sas#sas", "vm@sata#sata", "z"]);
    assert_eq!(cloud.console_output("s1").await.unwrap(), "login: ");
}
