//! `poolshift deps`: what an image is bound to.

use serde::Serialize;

use super::config::Deps;
use super::exit::Exit;
use super::values::human_bytes;
use super::{Context, images, output};
use crate::image::rbd::{FlattenBound, FlattenCost, ImageTree, RbdImage, RbdLink, RbdParentLink, SnapshotTree};
use crate::replicate;

/// What an image is bound to.
#[derive(Debug, Serialize)]
struct Report {
    /// Whose clone it is, and whose that is, nearest first.
    parents: Vec<RbdParentLink>,
    #[serde(flatten)]
    image: Node,
    /// What has to be done, in this order, before the image can be removed, the removal included.
    removal: Vec<Step>,
}

/// An image of the tree.
#[derive(Debug, Serialize)]
struct Node {
    image: RbdLink,
    size: u64,
    /// From the object map; `None` where that does not tell.
    own_bytes: Option<u64>,
    /// What flattening it would copy; `None` if it has no parent.
    flatten: Option<FlattenCost>,
    snapshots: Vec<SnapshotNode>,
}

#[derive(Debug, Serialize)]
struct SnapshotNode {
    id: u64,
    name: String,
    size: u64,
    /// Neither of a group nor in the trash.
    user: bool,
    protected: bool,
    /// Whether its name is of poolshift's scheme. That is no proof that poolshift made it.
    poolshift_name: bool,
    has_parent: bool,
    clones: Vec<Node>,
}

/// Something to do on the way to an image's removal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Step {
    action: Action,
    /// The image or snapshot.
    what: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Action {
    Flatten,
    Unprotect,
    RemoveSnapshot,
    RemoveImage,
}

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Deps) -> anyhow::Result<Exit> {
    let image: std::sync::Arc<RbdImage> = images::rbd(context, &settings.image).await?;
    let (parents, tree) = futures::try_join!(image.parents(), image.tree())?;
    if settings.json {
        let removal = removal(&tree);
        output::json(&Report { parents, image: node(&tree), removal })?;
    } else {
        output::bytes(draw(&parents, &tree).as_bytes())?;
    }
    Ok(Exit::Success)
}

fn node(tree: &ImageTree) -> Node {
    let snapshot = |SnapshotTree { snapshot, clones }: &SnapshotTree| SnapshotNode {
        id: snapshot.id,
        name: snapshot.name.clone(),
        size: snapshot.size,
        user: snapshot.user,
        protected: snapshot.protected,
        poolshift_name: replicate::is_automatic(&snapshot.name),
        has_parent: snapshot.has_parent,
        clones: clones.iter().map(node).collect(),
    };
    Node {
        image: tree.image.clone(),
        size: tree.relations.size,
        own_bytes: tree.relations.own_bytes,
        flatten: tree.relations.flatten,
        snapshots: tree.snapshots.iter().map(snapshot).collect(),
    }
}

/// What has to be done before an image can go, in order. A clone may as well be removed instead of flattened; that is
/// for its owner to say.
fn removal(tree: &ImageTree) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut step = |action, what: String| steps.push(Step { action, what });
    for clone in tree.clones_deepest_first() {
        if clone.relations.flatten.is_some() {
            step(Action::Flatten, clone.image.to_string());
        }
        // Without deep-flatten these still see the parent, and the clone counts as one until they are gone.
        if !clone.relations.deep_flatten {
            let bound = clone.snapshots.iter().filter(|snapshot| snapshot.snapshot.has_parent);
            remove_snapshots(clone, bound, &mut step);
        }
    }
    remove_snapshots(tree, tree.snapshots.iter(), &mut step);
    step(Action::RemoveImage, tree.image.to_string());
    steps
}

fn remove_snapshots<'a>(
    tree: &ImageTree,
    snapshots: impl Iterator<Item = &'a SnapshotTree>,
    step: &mut impl FnMut(Action, String),
) {
    for SnapshotTree { snapshot, .. } in snapshots {
        let what = format!("{}@{}", tree.image, snapshot.name);
        if snapshot.protected {
            step(Action::Unprotect, what.clone());
        }
        // One in the trash goes by itself when its last clone does.
        if snapshot.user {
            step(Action::RemoveSnapshot, what);
        }
    }
}

/// The whole answer for people.
fn draw(parents: &[RbdParentLink], tree: &ImageTree) -> String {
    let mut text = String::new();
    for (index, parent) in parents.iter().enumerate() {
        let overlap = human_bytes(parent.overlap_bytes);
        let indent = "  ".repeat(index);
        text.push_str(&format!("{indent}clone of {}@{}, {overlap} shared\n", parent.image, parent.snapshot));
    }
    text.push_str(&format!("{}\n", title(tree)));
    draw_snapshots(tree, "", &mut text);
    let removal = removal(tree);
    text.push_str(&match removal.len() {
        1 => "nothing has to go before it can be removed\n".to_owned(),
        _ => "before it can be removed, in this order:\n".to_owned(),
    });
    for (number, Step { action, what }) in removal[..removal.len() - 1].iter().enumerate() {
        let action = match action {
            Action::Flatten => "flatten (or remove)",
            Action::Unprotect => "unprotect",
            Action::RemoveSnapshot => "remove snapshot",
            Action::RemoveImage => "remove",
        };
        text.push_str(&format!("  {}. {action} {what}\n", number + 1));
    }
    text
}

fn title(tree: &ImageTree) -> String {
    let mut title = format!("{}, {}", tree.image, human_bytes(tree.relations.size));
    if let Some(own) = tree.relations.own_bytes {
        title.push_str(&format!(", {} of its own", human_bytes(own)));
    }
    if let Some(cost) = &tree.relations.flatten {
        title.push_str(&format!(", {}", cost_text(cost)));
    }
    title
}

/// What flattening costs, for people.
pub(super) fn cost_text(cost: &FlattenCost) -> String {
    let note = match cost.bound {
        FlattenBound::ObjectMap => "",
        FlattenBound::Overlap => " (all that is shared: there is no valid object map to tell what it has)",
    };
    format!("flattening copies at most {}{note}", human_bytes(cost.bytes_at_most))
}

fn draw_snapshots(tree: &ImageTree, indent: &str, text: &mut String) {
    for (index, SnapshotTree { snapshot, clones }) in tree.snapshots.iter().enumerate() {
        let is_last = index + 1 == tree.snapshots.len();
        let (branch, below) = branches(is_last);
        let mut notes = Vec::new();
        if !snapshot.user {
            notes.push("not a user's: removed with clones left, of a group, or mirroring's");
        }
        if snapshot.protected {
            notes.push("protected");
        }
        if replicate::is_automatic(&snapshot.name) {
            notes.push("named by poolshift's scheme");
        }
        let notes: String = notes.iter().map(|note| format!(", {note}")).collect();
        let (id, size) = (snapshot.id, human_bytes(snapshot.size));
        text.push_str(&format!("{indent}{branch}@{} (id {id}), {size}{notes}\n", snapshot.name));
        for (index, clone) in clones.iter().enumerate() {
            let (branch, deeper) = branches(index + 1 == clones.len());
            text.push_str(&format!("{indent}{below}{branch}{}\n", title(clone)));
            draw_snapshots(clone, &format!("{indent}{below}{deeper}"), text);
        }
    }
}

fn branches(is_last: bool) -> (&'static str, &'static str) {
    if is_last { ("└─ ", "   ") } else { ("├─ ", "│  ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::rbd::{RbdRelations, RbdSnapshot};

    fn link(image: &str) -> RbdLink {
        RbdLink { pool: "sata".into(), namespace: None, image: image.into(), id: "1".into(), trash: false }
    }

    fn tree(image: &str, flatten: Option<u64>, snapshots: Vec<SnapshotTree>) -> ImageTree {
        let flatten = flatten.map(|bytes_at_most| FlattenCost { bytes_at_most, bound: FlattenBound::ObjectMap });
        let kept = snapshots.iter().map(|snapshot| snapshot.snapshot.clone()).collect();
        let (size, parent) = (8 << 20, None);
        let relations =
            RbdRelations { size, own_bytes: Some(0), parent, flatten, deep_flatten: false, snapshots: kept };
        ImageTree { image: link(image), relations, snapshots }
    }

    fn snapshot(name: &str, has_parent: bool, clones: Vec<ImageTree>) -> SnapshotTree {
        let links = clones.iter().map(|clone| clone.image.clone()).collect();
        let (id, size, protected) = (4, 8 << 20, name == "p");
        let snapshot = RbdSnapshot { id, name: name.into(), size, user: true, protected, has_parent, clones: links };
        SnapshotTree { snapshot, clones }
    }

    #[test]
    fn the_tree_says_what_hangs_where_and_what_goes_first() {
        let grandchild = tree("e", Some(8 << 20), vec![]);
        let child = tree("c", Some(4 << 20), vec![snapshot("t", true, vec![grandchild])]);
        let root = tree(
            "vm",
            None,
            vec![
                snapshot("p", false, vec![child, tree("d", Some(0), vec![])]),
                snapshot("poolshift-20261123T220511.123Z", false, vec![]),
            ],
        );
        let parent = RbdParentLink { image: link("golden"), snapshot: "v1".into(), overlap_bytes: 4096 };
        insta::assert_snapshot!(draw(&[parent], &root), @"
        clone of rbd:sata/golden@v1, 4.0 KiB shared
        rbd:sata/vm, 8.0 MiB, 0 B of its own
        ├─ @p (id 4), 8.0 MiB, protected
        │  ├─ rbd:sata/c, 8.0 MiB, 0 B of its own, flattening copies at most 4.0 MiB
        │  │  └─ @t (id 4), 8.0 MiB
        │  │     └─ rbd:sata/e, 8.0 MiB, 0 B of its own, flattening copies at most 8.0 MiB
        │  └─ rbd:sata/d, 8.0 MiB, 0 B of its own, flattening copies at most 0 B
        └─ @poolshift-20261123T220511.123Z (id 4), 8.0 MiB, named by poolshift's scheme
        before it can be removed, in this order:
          1. flatten (or remove) rbd:sata/e
          2. flatten (or remove) rbd:sata/c
          3. remove snapshot rbd:sata/c@t
          4. flatten (or remove) rbd:sata/d
          5. unprotect rbd:sata/vm@p
          6. remove snapshot rbd:sata/vm@p
          7. remove snapshot rbd:sata/vm@poolshift-20261123T220511.123Z
        ");
    }

    #[test]
    fn an_image_with_nothing_on_it_just_goes() {
        let steps = removal(&tree("vm", None, vec![]));
        assert_eq!(steps, [Step { action: Action::RemoveImage, what: "rbd:sata/vm".into() }]);
    }
}
