//! Projects.
//!
//! Source of paths and fields: the Identity API, <https://docs.openstack.org/api-ref/identity/v3/#projects>.

use serde::Deserialize;

use super::Cloud;
use super::error::{CloudError, Fault, Result, if_there};
use super::session::Service;

/// A project.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Project {
    /// Its id.
    pub id: String,
    /// Its name, which another domain may have as well.
    pub name: String,
    /// Its domain.
    #[serde(default)]
    pub domain_id: String,
}

impl Cloud {
    /// The project with that id or, where there is none, of that name. Needs an administrator.
    ///
    /// # Errors
    /// [`Fault::NotFound`] where there is none, [`Fault::Config`] where several domains have one of that name.
    pub async fn find_project(&self, wanted: &str) -> Result<Project> {
        #[derive(Deserialize)]
        struct One {
            project: Project,
        }
        #[derive(Deserialize)]
        struct Several {
            projects: Vec<Project>,
        }
        let operation = format!("find project {wanted:?}");
        // Ids are 32 hexadecimal digits, or with dashes, or whatever another directory calls them.
        if super::checked(wanted, "project", &operation).is_ok() {
            let found = self.ask::<One>(Service::Keystone, &format!("projects/{wanted}"), &[], &operation).await;
            if let Some(One { project }) = if_there(found)? {
                return Ok(project);
            }
        }
        let mut found: Several = self.ask(Service::Keystone, "projects", &[("name", wanted)], &operation).await?;
        // Some releases compare names without regard to case.
        found.projects.retain(|project| project.name == wanted);
        let failed = |fault, detail: String| CloudError::new(fault, operation.clone(), self.name(), detail);
        match (found.projects.pop(), found.projects.as_slice()) {
            (Some(project), []) => Ok(project),
            (None, _) => Err(failed(Fault::NotFound, "it has no project with that id or of that name".into())
                .hint("list them with: openstack project list")),
            (Some(last), more) => {
                let all = more.iter().chain([&last]);
                let all: Vec<_> =
                    all.map(|project| format!("{} of the domain {}", project.id, project.domain_id)).collect();
                Err(failed(Fault::Config, "several domains have one of that name".into())
                    .hint(format!("give its id: {}", all.join(", "))))
            }
        }
    }
}
