//! How the client behaves, whatever a cloud does. What a real cloud does is tried on a real one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::access::{Identity, Interface, Ref};
use super::cinder::{MigrationPolicy, Volume};
use super::nova::{ServerAction, Whose};
use super::*;

mod fake;
mod requests;

use fake::{Fake, PASSWORD, PROJECT, answer, text, token, token_with, versions};

/// An error with all below it, its hint, and all that can be seen of it otherwise.
fn all_of(error: &CloudError) -> String {
    let mut text = format!("{error}; {}; {error:?}", error.hint.as_deref().unwrap_or("-"));
    let mut below = std::error::Error::source(error);
    while let Some(error) = below {
        text.push_str(&format!("; {error}; {error:?}"));
        below = error.source();
    }
    text
}

fn refused(result: Result<Cloud>) -> CloudError {
    result.expect_err("it connects")
}

#[tokio::test]
async fn who_asks_is_said_once_for_many() {
    let fake = Fake::with("/servers/detail", json!({"servers": []})).await;
    let cloud = Arc::new(fake.connect().await.unwrap());
    let asks = (0..20).map(|_| cloud.servers(&Whose::Own));
    futures::future::try_join_all(asks).await.unwrap();
    let [auth] = &fake.seen("/auth/tokens")[..] else { panic!("{:?}", fake.seen("/auth/tokens")) };
    assert_eq!(auth.line, "POST /identity/v3/auth/tokens");
    let user = json!({"name": "ann", "domain": {"id": "default"}, "password": PASSWORD});
    let expected = json!({"auth": {
        "identity": {"methods": ["password"], "password": {"user": user}},
        "scope": {"project": {"name": "p", "domain": {"name": "d"}}},
    }});
    assert_eq!((&auth.body, auth.header("X-Auth-Token")), (&expected, "-"));
    assert_eq!((cloud.project().await.unwrap(), cloud.roles().await.unwrap()), (PROJECT.into(), vec!["admin".into()]));
}

#[tokio::test]
async fn an_application_credential_is_for_its_own_project() {
    let fake = Fake::start(|_, _, _| None).await;
    for (credential, user, expected) in [
        (Ref::Id("c1".into()), None, json!({"id": "c1", "secret": "s3cret"})),
        (
            Ref::Name("mine".into()),
            Some((Ref::Name("ann".into()), Ref::Name("d".into()))),
            json!({"name": "mine", "secret": "s3cret", "user": {"name": "ann", "domain": {"name": "d"}}}),
        ),
        (
            Ref::Name("mine".into()),
            Some((Ref::Id("u1".into()), Ref::Id("unused".into()))),
            json!({"name": "mine", "secret": "s3cret", "user": {"id": "u1"}}),
        ),
    ] {
        let identity = Identity::ApplicationCredential { credential, user, secret: "s3cret".into() };
        Cloud::connect(CloudAccess { identity, ..fake.access() }).await.unwrap();
        let body = fake.seen("/auth/tokens").pop().unwrap().body;
        let methods = json!({"methods": ["application_credential"], "application_credential": expected});
        assert_eq!(body, json!({"auth": {"identity": methods}}));
    }
}

#[tokio::test]
async fn keystone_is_found_with_its_version_or_without() {
    let fake = Fake::start(|_, _, _| None).await;
    for path in ["/identity", "/identity/", "/identity/v3", "/identity/v3/"] {
        let auth_url = format!("{}{path}", fake.base()).parse().unwrap();
        Cloud::connect(CloudAccess { auth_url, ..fake.access() }).await.unwrap();
    }
    assert_eq!(fake.count("POST /identity/v3/auth/tokens"), 4);
}

#[tokio::test]
async fn a_token_is_renewed_before_it_ends() {
    // The first one has a minute left, which is too short; the others an hour.
    let fake = Fake::start(|seen, before, base| match seen.line.as_str() {
        "POST /identity/v3/auth/tokens" => Some(token(before, if before == 0 { 60 } else { 3600 }, base)),
        line if line.contains("/servers/detail") => Some(answer(200, json!({"servers": []}))),
        _ => None,
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    for _ in 0..3 {
        cloud.servers(&Whose::Own).await.unwrap();
    }
    assert_eq!(fake.count("/auth/tokens"), 2);
    assert!(fake.seen("/servers/detail").iter().all(|seen| seen.header("X-Auth-Token") == "token-1"));
}

#[tokio::test]
async fn a_token_that_is_taken_back_is_replaced_once() {
    let fake = Fake::start(|seen, before, _| match seen.line.as_str() {
        line if line.contains("/servers/detail") && seen.header("X-Auth-Token") == "token-0" => {
            Some(answer(401, json!({"error": {"code": 401, "message": "it has ended"}})))
        }
        line if line.contains("/servers/detail") => Some(answer(200, json!({"servers": []}))),
        // A change is made again as well: without a token nothing was done.
        line if line.starts_with("POST") && line.ends_with("/action") => {
            Some(answer(if before == 0 { 401 } else { 202 }, Value::Null))
        }
        line if line.contains("/types") => Some(answer(401, json!({"error": {"message": "never"}}))),
        _ => None,
    })
    .await;
    let cloud = fake.connect().await.unwrap();
    cloud.servers(&Whose::Own).await.unwrap();
    assert_eq!((fake.count("/servers/detail"), fake.count("/auth/tokens")), (2, 2));
    cloud.act_on_server("s1", ServerAction::Stop).await.unwrap();
    assert_eq!((fake.count("/action"), fake.count("/auth/tokens")), (2, 3));
    // It is not the token.
    let error = cloud.volume_types().await.unwrap_err();
    assert_eq!((error.fault, fake.count("/types"), fake.count("/auth/tokens")), (Fault::Unauthorized, 2, 4));
    assert!(error.to_string().ends_with("cannot list volume types: it answers 401: never"), "{error}");
}

#[tokio::test]
async fn who_is_not_known_is_told_where_that_was_said() {
    let fake = Fake::start(|seen, _, _| {
        let denied = json!({"error": {"code": 401, "message": "The request you have made requires authentication."}});
        seen.line.contains("/auth/tokens").then(|| answer(401, denied))
    })
    .await;
    let error = refused(fake.connect().await);
    assert_eq!((error.fault, fake.count("")), (Fault::Unauthorized, 1));
    assert!(error.to_string().contains("cannot get a token: it answers 401: The request you have"), "{error}");
    assert!(error.hint.unwrap().contains("the cloud test"));
}

#[tokio::test]
async fn a_services_address_is_that_of_the_region_and_interface() {
    let fake = Fake::start(|seen, _, base| {
        let endpoint = |region: &str, interface: &str, path: &str| {
            json!({"region_id": region, "interface": interface, "url": format!("{base}{path}")})
        };
        let catalog = json!([
            {"type": "volumev2", "endpoints": [endpoint("r2", "internal", "/old")]},
            {"type": "block-storage", "endpoints": [
                endpoint("r1", "internal", "/wrong"),
                endpoint("r2", "public", "/wrong"),
                endpoint("r2", "internal", "/cinder/v3"),
            ]},
            // Old releases write `region`.
            {"type": "compute", "endpoints": [{
                "region": "r2", "interface": "internal", "url": format!("{base}/compute/v2.1"),
            }]},
            {"type": "network", "endpoints": [endpoint("r2", "internal", "/network")]},
        ]);
        match seen.line.as_str() {
            "POST /identity/v3/auth/tokens" => Some(token_with(0, 3600, catalog)),
            "GET /cinder/v3/" => Some(versions("3.0", "3.50")),
            "GET /mine/v3/" => Some(versions("3.0", "3.50")),
            line if line.contains("/ports/") => Some(answer(200, json!({"port": {"id": "p", "device_id": "s"}}))),
            _ => None,
        }
    })
    .await;
    let at = |region: &str, interface| CloudAccess { region: Some(region.into()), interface, ..fake.access() };
    Cloud::connect(at("r2", Interface::Internal)).await.unwrap();
    assert_eq!((fake.count("GET /cinder/v3/"), fake.count("GET /wrong"), fake.count("GET /old")), (1, 0, 0));
    // What the configuration says counts more than the catalog.
    let mut given = at("r2", Interface::Internal);
    given.endpoints.insert("volumev3", format!("{}/mine/v3/{PROJECT}", fake.base()).parse().unwrap());
    // Of Neutron a catalog tells the version, or not.
    given.endpoints.insert("network", format!("{}/mine/v2.0/", fake.base()).parse().unwrap());
    let cloud = Cloud::connect(given).await.unwrap();
    assert_eq!((fake.count("GET /cinder/v3/"), fake.count("GET /mine/v3/")), (1, 1));
    assert_eq!(cloud.port("p").await.unwrap().device_id, "s");
    let cloud = Cloud::connect(at("r2", Interface::Internal)).await.unwrap();
    cloud.set_port_device(&cloud.port("p").await.unwrap(), "", None).await.unwrap();
    let asked = ["GET /mine/v2.0/ports/p", "PUT /network/v2.0/ports/p"].map(|line| fake.seen(line).len());
    assert_eq!(asked, [1, 1]);
    assert_eq!(fake.seen("PUT /network")[0].body, json!({"port": {"device_id": ""}}));
    // It is needed only where there are ports.
    let other = Fake::start(|_, _, _| None).await;
    let error = other.connect().await.unwrap().port("p").await.unwrap_err();
    assert!(error.fault == Fault::Config && error.to_string().contains("of a service network"), "{error}");

    for (access, missing) in [
        (at("r3", Interface::Internal), "the catalog has no internal address of a service volumev3 in the region r3"),
        (at("r2", Interface::Public), "the catalog has no public address of a service compute in the region r2"),
        (at("r2", Interface::Admin), "the catalog has no admin address of a service volumev3 in the region r2"),
    ] {
        // The public one of Cinder leads nowhere.
        let error = match Cloud::connect(access.clone()).await {
            Err(error) if error.fault == Fault::NotFound => {
                let mut access = access;
                access.endpoints.insert("volumev3", format!("{}/mine/v3", fake.base()).parse().unwrap());
                refused(Cloud::connect(access).await)
            }
            other => refused(other),
        };
        assert_eq!(error.fault, Fault::Config);
        assert!(error.to_string().ends_with(missing), "{error}");
        assert!(error.hint.unwrap().contains("openstack catalog list"));
    }
}

#[tokio::test]
async fn versions_are_asked_for_again_where_a_service_fails() {
    let fake = Fake::start(|seen, before, _| match (seen.line.as_str(), before) {
        ("GET /volume/v3/", 0) => Some(answer(503, Value::Null)),
        ("GET /volume/v3/", 1) => Some(answer(429, Value::Null).header("Retry-After", "0")),
        ("GET /compute/v2.1/", 0) => Some(answer(401, Value::Null)),
        _ => None,
    })
    .await;
    fake.connect().await.unwrap();
    let counts = ["GET /volume/v3/", "GET /compute/v2.1/", "/auth/tokens"].map(|line| fake.count(line));
    assert_eq!(counts, [3, 2, 2]);
}

#[tokio::test]
async fn a_cloud_that_is_too_old_is_refused_by_name() {
    for (cinder, nova, said) in [
        (
            ("3.0", "3.26"),
            ("2.1", "2.93"),
            "cinder of the cloud test: cannot work with it: it speaks 3.0 to 3.26, and 3.27",
        ),
        (
            ("3.0", "3.70"),
            ("2.1", "2.78"),
            "nova of the cloud test: cannot work with it: it speaks 2.1 to 2.78, and 2.79",
        ),
        (("3.28", "3.70"), ("2.1", "2.93"), "it speaks 3.28 to 3.70, and 3.27 is needed"),
        // Two digits are a number: 2.100 is newer than 2.79.
        (("3.0", "3.27"), ("2.80", "2.100"), "it speaks 2.80 to 2.100, and 2.79 is needed"),
        // Another major version, and none at all.
        (("2.0", "2.50"), ("2.1", "2.93"), "it names none that poolshift knows"),
        (("", ""), ("2.1", "2.93"), "it names none that poolshift knows"),
    ] {
        let fake = Fake::start(move |seen, _, _| match seen.line.as_str() {
            "GET /volume/v3/" => Some(versions(cinder.0, cinder.1)),
            "GET /compute/v2.1/" => Some(versions(nova.0, nova.1)),
            _ => None,
        })
        .await;
        let error = refused(fake.connect().await);
        assert_eq!(error.fault, Fault::Version, "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
    let exact = Fake::start(|seen, _, _| match seen.line.as_str() {
        "GET /volume/v3/" => Some(versions("3.27", "3.27")),
        "GET /compute/v2.1/" => Some(versions("2.79", "2.79")),
        _ => None,
    })
    .await;
    exact.connect().await.unwrap();
}

#[tokio::test]
async fn answers_that_make_no_sense_are_told_as_such() {
    let catalog = || json!({"token": {"expires_at": "2100-01-01T00:00:00Z", "project": {"id": "p"}, "catalog": []}});
    let without = move |key: &str| {
        let mut token = catalog();
        token["token"].as_object_mut().unwrap().remove(key);
        answer(201, token).header("X-Subject-Token", "t")
    };
    type Made = Box<dyn Fn() -> fake::Answer + Send + Sync>;
    let bodies: [(&str, Made); 5] = [
        ("no JSON", Box::new(|| text(201, "<html>").header("X-Subject-Token", "t"))),
        ("no token", Box::new(move || answer(201, catalog()))),
        ("no token", Box::new(|| answer(201, json!({})).header("X-Subject-Token", "t"))),
        ("no end", Box::new(move || without("expires_at"))),
        ("no project", Box::new(move || without("project"))),
    ];
    for (missing, body) in bodies {
        let fake = Fake::start(move |seen, _, _| seen.line.contains("/auth/").then(&body)).await;
        let error = refused(fake.connect().await);
        assert_eq!(error.fault, Fault::Strange, "{missing}: {error}");
        assert!(error.to_string().ends_with(&format!("its answer has {missing}")), "{missing}: {error}");
    }
    for body in ["<html>", "{}", "{\"servers\": 7}", "{\"servers\": [{\"id\": 7}]}", ""] {
        let fake = Fake::start(move |seen, _, _| seen.line.contains("/servers/detail").then(|| text(200, body))).await;
        let error = fake.connect().await.unwrap().servers(&Whose::Own).await.unwrap_err();
        assert_eq!(error.fault, Fault::Strange, "{body}");
        assert_eq!(fake.count("/servers/detail"), 1, "it is not asked again");
    }
}

#[tokio::test]
async fn a_certificate_authority_has_to_be_one() {
    let fake = Fake::start(|_, _, _| None).await;
    let folder = tempfile::tempdir().unwrap();
    let (missing, wrong) = (folder.path().join("missing.pem"), folder.path().join("wrong.pem"));
    std::fs::write(&wrong, "no certificate at all").unwrap();
    for (file, said) in [(missing, "missing.pem can't be read"), (wrong, "wrong.pem holds no certificate (PEM)")] {
        let error = refused(Cloud::connect(CloudAccess { ca_file: Some(file), ..fake.access() }).await);
        assert_eq!((error.fault, fake.count("")), (Fault::Config, 0));
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[tokio::test]
async fn nothing_that_is_secret_is_ever_shown() {
    let secrets = |text: &str| {
        for secret in [PASSWORD, "s3cret-of-mine", "token-0", "token-1"] {
            assert!(!text.contains(secret), "{secret} is in {text}");
        }
    };
    let identity = Identity::ApplicationCredential {
        credential: Ref::Id("c1".into()),
        user: None,
        secret: "s3cret-of-mine".into(),
    };
    // Every way to fail, with whatever Keystone, Cinder and Nova get to see.
    let failures: Vec<(&'static str, u16)> =
        ["/auth/tokens", "/volume/v3/", "/compute/v2.1/", "/servers/detail", "/action"]
            .into_iter()
            .flat_map(|path| [200, 302, 400, 401, 403, 404, 409, 413].map(|status| (path, status)))
            .collect();
    for (path, status) in failures {
        let fake =
            Fake::start(move |seen, _, _| seen.line.contains(path).then(|| answer(status, json!({"a": 1})))).await;
        for access in [fake.access(), CloudAccess { identity: identity.clone(), ..fake.access() }] {
            secrets(&format!("{access:?}"));
            let cloud = match Cloud::connect(access).await {
                Ok(cloud) => cloud,
                Err(error) => {
                    secrets(&all_of(&error));
                    continue;
                }
            };
            secrets(&format!("{cloud:?}"));
            for outcome in
                [cloud.servers(&Whose::Own).await.map(drop), cloud.act_on_server("s", ServerAction::Stop).await]
            {
                secrets(&outcome.map_or_else(|error| all_of(&error), |()| String::new()));
            }
        }
    }
}

#[test]
fn a_volume_is_read_as_cinder_writes_it() {
    let read = |written: Value| serde_json::from_value::<Volume>(written).unwrap();
    let least = read(json!({"id": "v", "size": 1, "status": "available", "name": null, "bootable": null}));
    assert_eq!((least.name.as_str(), least.bootable, least.image().as_str()), ("", false, "volume-v"));
    let bootable = |flag: Value| read(json!({"id": "v", "size": 1, "status": "s", "bootable": flag})).bootable;
    assert_eq!(["true", "True", "false", ""].map(|text| bootable(text.into())), [true, true, false, false]);
    assert!(bootable(true.into()));
    let image = |name_id: Value| {
        read(json!({"id": "v", "size": 1, "status": "s", "os-vol-mig-status-attr:name_id": name_id})).image()
    };
    assert_eq!([json!("w"), json!(""), json!(null)].map(image), ["volume-w", "volume-v", "volume-v"]);
    let moving = |status: &str, migration: Value| {
        read(json!({"id": "v", "size": 1, "status": status, "os-vol-mig-status-attr:migstat": migration})).is_moving()
    };
    assert!(moving("retyping", Value::Null) && moving("in-use", json!("migrating")));
    assert!(
        moving("in-use", json!("target:1")) && !moving("in-use", json!("success")) && !moving("error", json!(null))
    );
}

/// Keeps a paused clock of a runtime of one thread from going on by itself, until it is dropped: while a request is under
/// way nothing is to do but wait for the socket, which is no reason for its time limit to pass.
pub(super) fn stop_clock() -> Option<std::sync::mpsc::Sender<()>> {
    let handle = tokio::runtime::Handle::current();
    (handle.runtime_flavor() == tokio::runtime::RuntimeFlavor::CurrentThread).then(|| {
        let (release, released) = std::sync::mpsc::channel();
        // The clock stands still for as long as there is work on the threads for blocking work.
        drop(handle.spawn_blocking(move || released.recv()));
        release
    })
}
