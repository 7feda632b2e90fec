//! How to reach a cloud: `clouds.yaml` and the `OS_*` variables, as the OpenStack tools read them.
//!
//! Source: "Configuring OpenStack SDK Applications", <https://docs.openstack.org/openstacksdk/latest/user/config/configuration.html>.
//! The order is the same: a cloud that is named (`--os-cloud`, `OS_CLOUD`) comes from the files; without a name the
//! `OS_*` variables are the cloud, if `OS_AUTH_URL` is among them; otherwise the only cloud of the files. Not read are
//! the profiles of vendors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use secrecy::SecretString;
use serde::Deserialize;
use url::Url;

use super::error::{CloudError, Fault, Result};

/// The largest configuration file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Who asks, where, and how the answer is known to be the cloud's.
#[derive(Clone, Debug)]
pub struct CloudAccess {
    /// What the cloud is called, for people: `the cloud prod of /etc/openstack/clouds.yaml`.
    pub name: String,
    /// Keystone's address, with its version: `https://controller:5000/v3`.
    pub auth_url: Url,
    /// Who asks.
    pub identity: Identity,
    /// The region; `None` takes the only one.
    pub region: Option<String>,
    /// Which of a service's addresses is taken.
    pub interface: Interface,
    /// A file with the certificates of a private CA.
    pub ca_file: Option<PathBuf>,
    /// Whether the cloud's certificates are checked.
    pub verify: bool,
    /// Addresses that are taken instead of the catalog's, by service type: `volumev3`, `compute`.
    pub endpoints: BTreeMap<&'static str, Url>,
}

/// A user, a project or a domain, by its id or by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ref {
    /// Its id.
    Id(String),
    /// Its name.
    Name(String),
}

/// Who asks.
#[derive(Clone, Debug)]
pub enum Identity {
    /// A user with a password, for a project.
    Password {
        /// The user.
        user: Ref,
        /// The user's domain, where the user is named.
        user_domain: Ref,
        /// The password.
        password: SecretString,
        /// The project.
        project: Ref,
        /// The project's domain, where the project is named.
        project_domain: Ref,
    },
    /// An application credential, which is for one project.
    ApplicationCredential {
        /// The credential.
        credential: Ref,
        /// Whose it is, where it is named.
        user: Option<(Ref, Ref)>,
        /// Its secret.
        secret: SecretString,
    },
}

/// Which of a service's addresses is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interface {
    /// Everybody's.
    #[default]
    Public,
    /// That for the cloud's own services.
    Internal,
    /// That for its administrators.
    Admin,
}

impl Interface {
    /// Its name in the catalog.
    pub fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Internal => "internal",
            Self::Admin => "admin",
        }
    }
}

#[derive(Default, Deserialize)]
struct CloudsFile {
    #[serde(default)]
    clouds: BTreeMap<String, serde_json::Value>,
}

/// The variables that stand for a cloud's settings, with the setting.
const VARIABLES: &[(&str, &str)] = &[
    ("OS_AUTH_URL", "auth.auth_url"),
    ("OS_USERNAME", "auth.username"),
    ("OS_USER_ID", "auth.user_id"),
    ("OS_PASSWORD", "auth.password"),
    ("OS_PROJECT_NAME", "auth.project_name"),
    ("OS_PROJECT_ID", "auth.project_id"),
    ("OS_TENANT_NAME", "auth.project_name"),
    ("OS_TENANT_ID", "auth.project_id"),
    ("OS_USER_DOMAIN_NAME", "auth.user_domain_name"),
    ("OS_USER_DOMAIN_ID", "auth.user_domain_id"),
    ("OS_PROJECT_DOMAIN_NAME", "auth.project_domain_name"),
    ("OS_PROJECT_DOMAIN_ID", "auth.project_domain_id"),
    ("OS_DEFAULT_DOMAIN", "auth.default_domain"),
    ("OS_APPLICATION_CREDENTIAL_ID", "auth.application_credential_id"),
    ("OS_APPLICATION_CREDENTIAL_NAME", "auth.application_credential_name"),
    ("OS_APPLICATION_CREDENTIAL_SECRET", "auth.application_credential_secret"),
    ("OS_AUTH_TYPE", "auth_type"),
    ("OS_REGION_NAME", "region_name"),
    ("OS_INTERFACE", "interface"),
    ("OS_ENDPOINT_TYPE", "interface"),
    ("OS_CACERT", "cacert"),
    ("OS_INSECURE", "insecure"),
    ("OS_BLOCK_STORAGE_ENDPOINT_OVERRIDE", "block_storage_endpoint_override"),
    ("OS_COMPUTE_ENDPOINT_OVERRIDE", "compute_endpoint_override"),
    ("OS_NETWORK_ENDPOINT_OVERRIDE", "network_endpoint_override"),
];

/// The service types of the overrides.
const OVERRIDES: &[(&str, &str)] = &[
    ("block_storage_endpoint_override", "volumev3"),
    ("volume_endpoint_override", "volumev3"),
    ("volumev3_endpoint_override", "volumev3"),
    ("compute_endpoint_override", "compute"),
    ("network_endpoint_override", "network"),
];

fn bad(place: impl Into<String>, detail: impl Into<String>) -> CloudError {
    CloudError::new(Fault::Config, "find out how to reach the cloud", place, detail)
}

impl CloudAccess {
    /// The access that a person means: with the cloud of that name, or by the process's environment.
    ///
    /// # Errors
    /// [`Fault::Config`] where a file can't be read, or what it says is not enough.
    pub fn load(cloud: Option<&str>) -> Result<Self> {
        Self::load_with(cloud, &|key| std::env::var(key).ok().filter(|value| !value.is_empty()))
    }

    /// The same with an environment of one's own.
    pub fn load_with(cloud: Option<&str>, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let named = cloud.map(str::to_owned).or_else(|| variable("OS_CLOUD"));
        if named.is_none() && variable("OS_AUTH_URL").is_some() {
            let mut settings = serde_json::Map::new();
            for (key, setting) in VARIABLES {
                if let Some(value) = variable(key) {
                    let (table, key) = match setting.split_once('.') {
                        Some((table, key)) => (Some(table), key),
                        None => (None, *setting),
                    };
                    let place = match table {
                        Some(table) => settings.entry(table).or_insert_with(|| serde_json::json!({})).as_object_mut(),
                        None => Some(&mut settings),
                    };
                    if let Some(place) = place {
                        place.entry(key).or_insert(value.into());
                    }
                }
            }
            return Self::of("the cloud of the OS_* variables", &settings.into());
        }
        let (clouds, file) = clouds_file(named.as_deref(), variable)?;
        let names = || clouds.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let (name, settings) = match &named {
            Some(name) => {
                let found = clouds.get(name).ok_or_else(|| {
                    bad(file.display().to_string(), format!("it has no cloud {name:?}"))
                        .hint(format!("its clouds are: {}", names()))
                })?;
                (name, found)
            }
            None if clouds.len() == 1 => clouds.iter().next().unwrap_or_else(|| unreachable!("there is one")),
            None => {
                return Err(bad(file.display().to_string(), "it has several clouds")
                    .hint(format!("say which one with --os-cloud, or OS_CLOUD: {}", names())));
            }
        };
        Self::of(&format!("the cloud {name} of {}", file.display()), settings)
    }

    /// From the settings of a cloud as `clouds.yaml` has them.
    fn of(name: &str, settings: &serde_json::Value) -> Result<Self> {
        let text = |key: &str| setting(settings, key).or_else(|| setting(settings.get("auth")?, key));
        let missing = |what: &str| bad(name, format!("it says nothing about {what}"));
        if text("profile").is_some() {
            return Err(bad(name, "it refers to a vendor's profile, which poolshift does not read")
                .hint("write its auth_url into the file"));
        }
        let auth_url = text("auth_url").ok_or_else(|| missing("auth_url"))?;
        let auth_url = Url::parse(&auth_url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some())
            .ok_or_else(|| bad(name, "its auth_url is no address of http or https"))?;
        if auth_url.password().is_some() || !auth_url.username().is_empty() {
            return Err(bad(name, "its auth_url has a user or a password in it").hint("they have keys of their own"));
        }
        let interface = match text("interface").map(|name| name.trim_end_matches("URL").to_owned()).as_deref() {
            None | Some("public") => Interface::Public,
            Some("internal") => Interface::Internal,
            Some("admin") => Interface::Admin,
            Some(other) => return Err(bad(name, format!("{other:?} is no interface: public, internal or admin"))),
        };
        let flag = |key: &str| match settings.get(key) {
            Some(serde_json::Value::Bool(flag)) => Some(*flag),
            Some(serde_json::Value::String(text)) => match text.to_ascii_lowercase().as_str() {
                "1" | "true" | "yes" | "on" => Some(true),
                "0" | "false" | "no" | "off" => Some(false),
                _ => None,
            },
            _ => None,
        };
        let mut endpoints = BTreeMap::new();
        for (key, service) in OVERRIDES {
            if let Some(written) = text(key) {
                let url = Url::parse(&written).map_err(|_| bad(name, format!("its {key} is no address")))?;
                endpoints.entry(*service).or_insert(url);
            }
        }
        Ok(Self {
            name: name.to_owned(),
            auth_url,
            identity: identity(name, &text)?,
            region: text("region_name"),
            interface,
            ca_file: text("cacert").map(PathBuf::from),
            verify: flag("verify").unwrap_or(true) && !flag("insecure").unwrap_or(false),
            endpoints,
        })
    }
}

fn identity(name: &str, text: &dyn Fn(&str) -> Option<String>) -> Result<Identity> {
    let either = |id: &str, named: &str| text(id).map(Ref::Id).or_else(|| text(named).map(Ref::Name));
    let missing = |what: &str| bad(name, format!("it says nothing about {what}"));
    let domain = |id: &str, named: &str| {
        either(id, named)
            .or_else(|| either("domain_id", "domain_name"))
            .or_else(|| text("default_domain").map(Ref::Id))
            .unwrap_or_else(|| Ref::Id("default".into()))
    };
    let credential = either("application_credential_id", "application_credential_name");
    match (text("auth_type").as_deref(), credential) {
        (Some("v3applicationcredential"), credential) | (None, credential @ Some(_)) => {
            let credential = credential.ok_or_else(|| missing("application_credential_id"))?;
            let secret =
                text("application_credential_secret").ok_or_else(|| missing("application_credential_secret"))?;
            let user = match &credential {
                Ref::Id(_) => None,
                Ref::Name(_) => Some((
                    either("user_id", "username").ok_or_else(|| missing("username, whose credential it is"))?,
                    domain("user_domain_id", "user_domain_name"),
                )),
            };
            Ok(Identity::ApplicationCredential { credential, user, secret: secret.into() })
        }
        (None | Some("password" | "v3password"), _) => Ok(Identity::Password {
            user: either("user_id", "username").ok_or_else(|| missing("username"))?,
            user_domain: domain("user_domain_id", "user_domain_name"),
            password: text("password").ok_or_else(|| missing("password"))?.into(),
            project: either("project_id", "project_name").ok_or_else(|| missing("project_name"))?,
            project_domain: domain("project_domain_id", "project_domain_name"),
        }),
        (Some(other), _) => Err(bad(name, format!("poolshift can't authenticate by {other:?}"))
            .hint("use a password, or an application credential (auth_type: v3applicationcredential)")),
    }
}

/// A setting as text; numbers are taken for what they look like.
fn setting(table: &serde_json::Value, key: &str) -> Option<String> {
    match table.get(key)? {
        serde_json::Value::String(text) if !text.is_empty() => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The clouds of the first `clouds.yaml` that is there, with what `secure.yaml` adds. `named` is the one that is wanted.
fn clouds_file(
    named: Option<&str>,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<(BTreeMap<String, serde_json::Value>, PathBuf)> {
    let home = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".config")));
    let folders: Vec<PathBuf> = [Some(PathBuf::from(".")), home.map(|home| home.join("openstack"))]
        .into_iter()
        .flatten()
        .chain([PathBuf::from("/etc/openstack")])
        .collect();
    let find = |given: Option<String>, name: &str| match given {
        Some(file) => Some(PathBuf::from(file)),
        None => folders
            .iter()
            .flat_map(|folder| ["yaml", "yml"].map(|ending| folder.join(format!("{name}.{ending}"))))
            .find(|file| file.exists()),
    };
    let Some(file) = find(variable("OS_CLIENT_CONFIG_FILE"), "clouds") else {
        let looked: Vec<String> =
            folders.iter().map(|folder| folder.join("clouds.yaml").display().to_string()).collect();
        let looked = looked.join(", ");
        return Err(match named {
            Some(name) => bad("no cloud", format!("there is no clouds.yaml, which would have the cloud {name:?}"))
                .hint(format!("it is looked for at {looked}; the other OS_* variables are for no named cloud")),
            None => bad("no cloud", "neither OS_AUTH_URL is set, nor is there a clouds.yaml")
                .hint(format!("it is looked for at {looked}; or source the cloud's openrc file")),
        });
    };
    let mut clouds = read(&file)?;
    if let Some(secure) = find(variable("OS_CLIENT_SECURE_FILE"), "secure") {
        for (name, more) in read(&secure)? {
            merge(clouds.entry(name).or_insert_with(|| serde_json::json!({})), more);
        }
    }
    Ok((clouds, file))
}

/// What a second file says counts, key by key.
fn merge(into: &mut serde_json::Value, more: serde_json::Value) {
    match (into, more) {
        (serde_json::Value::Object(into), serde_json::Value::Object(more)) => {
            for (key, value) in more {
                merge(into.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (into, more) => *into = more,
    }
}

fn read(file: &Path) -> Result<BTreeMap<String, serde_json::Value>> {
    let place = file.display().to_string();
    let length = std::fs::metadata(file).map_err(|error| bad(&place, "it can't be read").caused_by(error))?.len();
    if length > FILE_MAX {
        return Err(bad(place, format!("it has {length} bytes; the most is {FILE_MAX}")));
    }
    let text = std::fs::read_to_string(file).map_err(|error| bad(&place, "it can't be read").caused_by(error))?;
    // The parser's own words may quote the file, and with it a password: only where it failed is told.
    let parsed: CloudsFile = serde_saphyr::from_str(&text).map_err(|error| {
        let line = error.location().map_or_else(String::new, |at| format!(" at line {}", at.line()));
        bad(&place, format!("it is no clouds.yaml{line}")).hint("it has a table `clouds` with a table for each cloud")
    })?;
    Ok(parsed.clouds)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use secrecy::ExposeSecret;

    use super::*;

    fn load(cloud: Option<&str>, variables: &[(&str, &str)]) -> Result<CloudAccess> {
        let variables: HashMap<_, _> = variables.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        CloudAccess::load_with(cloud, &|key| variables.get(key).cloned())
    }

    fn files(clouds: &str, secure: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("openstack")).unwrap();
        std::fs::write(folder.path().join("openstack/clouds.yaml"), clouds).unwrap();
        if !secure.is_empty() {
            std::fs::write(folder.path().join("openstack/secure.yaml"), secure).unwrap();
        }
        folder
    }

    const TWO: &str = "clouds:\n  prod:\n    auth:\n      auth_url: https://k:5000/v3\n      username: ann\n      \
                       project_name: p\n      user_domain_name: d\n    region_name: r1\n    interface: internal\n    \
                       cacert: /ca.pem\n  lab:\n    auth_type: v3applicationcredential\n    auth:\n      auth_url: \
                       http://lab:5000\n      application_credential_id: abc\n      application_credential_secret: s3cret\n    \
                       verify: false\n";

    #[test]
    fn the_variables_are_a_cloud() {
        let access = load(
            None,
            &[
                ("OS_AUTH_URL", "http://k:5000/v3"),
                ("OS_USERNAME", "ann"),
                ("OS_PASSWORD", "12345"),
                ("OS_PROJECT_NAME", "p"),
                ("OS_USER_DOMAIN_NAME", "Default"),
                ("OS_PROJECT_DOMAIN_ID", "default"),
            ],
        )
        .unwrap();
        let Identity::Password { user, user_domain, password, project, project_domain } = &access.identity else {
            panic!("{access:?}")
        };
        assert_eq!((user, user_domain), (&Ref::Name("ann".into()), &Ref::Name("Default".into())));
        assert_eq!((project, project_domain), (&Ref::Name("p".into()), &Ref::Id("default".into())));
        assert_eq!(password.expose_secret(), "12345");
        assert!(!format!("{access:?}").contains("12345"));
        assert!(access.verify);
    }

    #[test]
    fn a_cloud_of_the_files_has_its_secret_from_the_other_one() {
        let folder = files(TWO, "clouds:\n  prod:\n    auth:\n      password: hush\n");
        let home = folder.path().to_str().unwrap();
        let access = load(Some("prod"), &[("XDG_CONFIG_HOME", home)]).unwrap();
        let Identity::Password { password, user_domain, .. } = &access.identity else { panic!("{access:?}") };
        assert_eq!((password.expose_secret(), user_domain), ("hush", &Ref::Name("d".into())));
        assert_eq!((access.region.as_deref(), access.interface), (Some("r1"), Interface::Internal));
        assert_eq!(access.ca_file.as_deref(), Some(Path::new("/ca.pem")));
        // A name in the environment counts more than its other variables.
        let lab = load(None, &[("XDG_CONFIG_HOME", home), ("OS_CLOUD", "lab"), ("OS_AUTH_URL", "http://x")]).unwrap();
        assert!(
            matches!(&lab.identity, Identity::ApplicationCredential { credential: Ref::Id(id), .. } if id == "abc")
        );
        assert!(!lab.verify);
    }

    #[test]
    fn what_is_wrong_is_told_without_a_secret() {
        let folder = files(TWO, "");
        let home = folder.path().to_str().unwrap();
        let said = |result: Result<CloudAccess>| {
            let error = result.unwrap_err();
            assert_eq!(error.fault, Fault::Config);
            format!("{error}; {}", error.hint.clone().unwrap_or_default())
        };
        let several = said(load(None, &[("XDG_CONFIG_HOME", home)]));
        assert!(several.contains("lab, prod"), "{several}");
        let unknown = said(load(Some("test"), &[("XDG_CONFIG_HOME", home)]));
        assert!(unknown.contains("no cloud \"test\"") && unknown.contains("lab, prod"), "{unknown}");
        let without = said(load(Some("prod"), &[("XDG_CONFIG_HOME", home)]));
        assert!(without.contains("nothing about password"), "{without}");
        let nothing = said(load(None, &[("HOME", "/nowhere")]));
        assert!(nothing.contains("/nowhere/.config/openstack/clouds.yaml"), "{nothing}");
        let named = said(load(None, &[("HOME", "/nowhere"), ("OS_CLOUD", "prod"), ("OS_AUTH_URL", "http://k:5000")]));
        assert!(named.contains("\"prod\"") && !named.contains("neither OS_AUTH_URL"), "{named}");
        let url = said(load(None, &[("OS_AUTH_URL", "http://ann:hush@k:5000")]));
        assert!(!url.contains("hush"), "{url}");
        let broken = files("clouds:\n  prod:\n    auth: {password: hush, : }}\n", "");
        let broken = said(load(Some("prod"), &[("XDG_CONFIG_HOME", broken.path().to_str().unwrap())]));
        assert!(!broken.contains("hush") && broken.contains("no clouds.yaml"), "{broken}");
    }
}
