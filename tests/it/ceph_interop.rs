//! poolshift and `rbd` read each other's diffs: rbd's own workunits (diff, merge_diff, diff_continuous), written anew
//! and held against what was written to the disk; and poolshift's own stream between two images.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use poolshift::delta::stream::DiffReader;
use poolshift::extent::{ByteRange, Extent, normalize_extents};
use poolshift::image::rbd::CreateOptions;

use crate::librbd::{Disk, KIB, Librbd, MIB, find_fault, name};
use crate::support::{CephEnv, Run, binary, ceph};

/// The two programs, and a folder for their files.
struct Tools {
    env: CephEnv,
    folder: tempfile::TempDir,
    tag: String,
}

impl Tools {
    fn new(env: &CephEnv, tag: &str) -> Self {
        Self { env: env.clone(), folder: tempfile::tempdir().unwrap(), tag: name(tag) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn image(&self, pool: &str, name: &str) -> String {
        format!("{pool}/{}-{name}", self.tag)
    }

    fn rbd<A: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new("rbd");
        command.env_remove("CEPH_ARGS").arg("-c").arg(&self.env.conf).args(["--id", &self.env.user]);
        command.args(words);
        command
    }

    fn poolshift<A: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Command {
        let mut command = binary();
        command.arg("--ceph-conf").arg(&self.env.conf).args(["--ceph-user", &self.env.user]).args(words);
        command
    }

    /// The diff that leads to `image@to`, made by poolshift or by rbd.
    fn export(&self, ours: bool, image: &str, from: Option<&str>, to: &str, file: &Path) -> Command {
        self.export_point(ours, &format!("{image}@{to}"), from, file)
    }

    /// The diff that leads to a point: `IMAGE@SNAPSHOT`, or `IMAGE` for HEAD.
    fn export_point(&self, ours: bool, point: &str, from: Option<&str>, file: &Path) -> Command {
        let from = from.map(|from| [if ours { "--from" } else { "--from-snap" }, from]);
        let prefix = if ours { "rbd:" } else { "" };
        let mut command = if ours { self.poolshift(["export-diff"]) } else { self.rbd(["export-diff"]) };
        command.arg(format!("{prefix}{point}")).arg(file).args(from.iter().flatten());
        command
    }

    fn import(&self, ours: bool, file: &Path, image: &str) -> Command {
        let mut command = if ours { self.poolshift(["import-diff"]) } else { self.rbd(["import-diff"]) };
        command.arg(file).arg(if ours { format!("rbd:{image}") } else { image.to_owned() });
        command
    }

    fn merge(&self, ours: bool, files: [&Path; 3]) -> Command {
        let mut command = if ours { self.poolshift(["merge-diff"]) } else { self.rbd(["merge-diff"]) };
        command.args(files);
        command
    }
}

/// Runs a command to its end.
async fn run(mut command: Command) -> Run {
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Run { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

async fn done(command: Command) {
    let words = format!("{command:?}");
    let ended = run(command).await;
    assert_eq!(ended.code, Some(0), "{words}:\n{}", ended.stderr);
}

/// `first | second`; both end well.
async fn pipe(mut first: Command, second: Command) {
    let mut first = first.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut second = second;
    second.stdin(first.stdout.take().unwrap());
    done(second).await;
    assert!(first.wait().unwrap().success());
}

const STDIO: &str = "-";

/// An image with a few snapshots, and what each of them holds.
struct History {
    disk: Disk,
    parent: Option<String>,
    points: Vec<(String, Vec<u8>)>,
}

impl History {
    fn options(striped: bool) -> CreateOptions {
        let stripe_unit = if striped { 64 * KIB } else { 512 * KIB };
        let stripe_count = if striped { 8 } else { 1 };
        CreateOptions { object_size: 512 * KIB, stripe_unit, stripe_count, ..CreateOptions::new(8 * MIB + 5000) }
    }

    async fn new(tools: &Tools, striped: bool, cloned: bool, seed: u64) -> Self {
        let (image, parent) = (tools.image("sata", "source"), tools.image("sata", "parent"));
        let options = Self::options(striped);
        let mut disk = Disk::create(&tools.env, if cloned { &parent } else { &image }, seed, &options).await;
        if cloned {
            disk.write_noise(MIB + 7, 5 * MIB).await;
            disk.snapshot("golden").await;
            disk.librbd.call(format!("clone {parent}@golden {image}")).await;
            disk.librbd.call(format!("close {parent}")).await;
            disk.image.clone_from(&image);
        }
        let mut history = Self { disk, parent: cloned.then_some(parent), points: Vec::new() };
        for (number, size) in [0, 0, 3 * MIB + 700, 9 * MIB, 0].into_iter().enumerate() {
            for _ in 0..6 {
                history.disk.change(0).await;
            }
            if size > 0 {
                history.disk.resize(size).await;
                history.disk.change(0).await;
            }
            history.snapshot(&format!("s{number}")).await;
        }
        history
    }

    async fn snapshot(&mut self, name: &str) {
        self.disk.snapshot(name).await;
        self.points.push((name.to_owned(), self.disk.bytes.clone()));
    }

    /// Every snapshot that the copy has too, read plainly and by `rbd export`, and its HEAD.
    async fn check(&mut self, tools: &Tools, copy: &str) {
        let names = self.disk.librbd.snapshots(copy).await;
        assert_eq!(names.last(), self.points.last().map(|(name, _)| name), "{copy}");
        for (name, bytes) in self.points.iter().filter(|(name, _)| names.contains(name)) {
            assert!(self.disk.librbd.read(&format!("{copy}@{name}")).await == *bytes, "{copy}@{name}");
        }
        let exported = tools.file("exported");
        done(tools.rbd([OsStr::new("export"), copy.as_ref(), exported.as_os_str()])).await;
        let same = std::fs::read(&exported).unwrap() == self.points.last().unwrap().1;
        assert!(same, "{copy}: HEAD, by rbd export");
        std::fs::remove_file(exported).unwrap();
    }

    async fn remove(mut self, copies: &[String]) {
        let mut images: Vec<&str> = copies.iter().map(String::as_str).collect();
        let source = self.disk.image.clone();
        images.push(&source);
        self.disk.librbd.remove(&images).await;
        if let Some(parent) = self.parent {
            self.disk.librbd.remove(&[&parent]).await;
        }
    }
}

/// Every diff of a history, made by one program and read by the other, and what the programs merge of them.
async fn exchange(env: &CephEnv, striped: bool, cloned: bool, seed: u64) {
    let tools = Tools::new(env, &format!("exchange-{seed}"));
    let mut history = History::new(&tools, striped, cloned, seed).await;
    let source = history.disk.image.clone();
    let mut copies = Vec::new();
    for ours in [true, false] {
        let label = if ours { "ours" } else { "rbds" };
        let files: Vec<PathBuf> = (0..5).map(|number| tools.file(&format!("{label}-{number}"))).collect();
        for (number, file) in files.iter().enumerate() {
            let from = number.checked_sub(1).map(|from| format!("s{from}"));
            done(tools.export(ours, &source, from.as_deref(), &format!("s{number}"), file)).await;
        }
        let copy = tools.image("sas", label);
        history.disk.librbd.create(&copy, &CreateOptions { size: MIB, ..History::options(!striped) }).await;
        for file in &files {
            // What one made the other reads.
            done(tools.import(!ours, file, &copy)).await;
        }
        history.check(&tools, &copy).await;
        copies.push(copy);
        // rbd merges streams with ascending offsets only: its own of a striped image are not.
        if !striped || ours {
            let merged = tools.image("sas", &format!("{label}-merged"));
            history.disk.librbd.create(&merged, &CreateOptions { size: MIB, ..History::options(striped) }).await;
            let out: Vec<PathBuf> = (0..3).map(|number| tools.file(&format!("{label}-merged-{number}"))).collect();
            done(tools.merge(!ours, [&files[0], &files[1], &out[0]])).await;
            done(tools.merge(ours, [&files[2], &files[3], &out[1]])).await;
            done(tools.merge(!ours, [&out[1], &files[4], &out[2]])).await;
            done(tools.import(ours, &out[0], &merged)).await;
            done(tools.import(!ours, &out[2], &merged)).await;
            assert_eq!(history.disk.librbd.snapshots(&merged).await, ["s1", "s4"]);
            history.check(&tools, &merged).await;
            copies.push(merged);
        }
    }
    same_listing(&tools, &history, striped).await;
    history.remove(&copies).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn each_reads_and_merges_what_the_other_wrote() {
    let env = ceph();
    futures::join!(exchange(&env, false, false, 1), exchange(&env, true, false, 2), exchange(&env, false, true, 3));
}

#[derive(serde::Deserialize)]
struct Row {
    offset: u64,
    length: u64,
    exists: String,
}

fn extents(json: &str) -> Vec<Extent> {
    let rows: Vec<Row> = serde_json::from_str(json).unwrap();
    let extents = rows.into_iter().map(|row| {
        let range = ByteRange::new(row.offset, row.length).unwrap();
        match row.exists.as_str() {
            "true" => Extent::data(range),
            "false" => Extent::zero(range),
            other => panic!("exists is {other}"),
        }
    });
    extents.collect()
}

/// The header of a diff: from, to, size.
async fn header(file: &Path) -> (Option<String>, Option<String>, u64) {
    let bytes = std::fs::read(file).unwrap();
    let header = DiffReader::open(bytes.as_slice()).await.unwrap().header().clone();
    (header.from, header.to, header.size)
}

/// HEAD of a copy, by `rbd export`, and its snapshots.
async fn check_head(tools: &Tools, history: &mut History, copy: &str, snapshots: &[&str]) {
    let exported = tools.file("exported");
    done(tools.rbd([OsStr::new("export"), copy.as_ref(), exported.as_os_str()])).await;
    assert!(std::fs::read(&exported).unwrap() == history.disk.bytes, "{copy}: HEAD, by rbd export");
    std::fs::remove_file(exported).unwrap();
    assert_eq!(history.disk.librbd.snapshots(copy).await, snapshots, "{copy}");
}

/// A diff of HEAD, which names no snapshot: made by one program and imported by the other, whole, from a snapshot, and
/// merged to one.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_stopped_servers_head_is_exchanged_both_ways() {
    let env = ceph();
    let tools = Tools::new(&env, "head");
    let mut history = History::new(&tools, false, true, 6).await;
    let source = history.disk.image.clone();
    for _ in 0..6 {
        history.disk.change(0).await;
    }
    history.disk.resize(7 * MIB + 300).await;
    history.disk.change(0).await;
    history.disk.librbd.call(format!("close {source}")).await;
    let size = history.disk.size();
    let mut copies = Vec::new();
    for ours in [true, false] {
        let label = if ours { "ours" } else { "rbds" };
        let [whole, base, last, head, merged] =
            ["whole", "base", "last", "head", "merged"].map(|part| tools.file(&format!("{label}-{part}")));
        done(tools.export_point(ours, &source, None, &whole)).await;
        assert_eq!(header(&whole).await, (None, None, size));
        let copy = tools.image("sas", &format!("{label}-whole"));
        history.disk.librbd.create(&copy, &CreateOptions { size: MIB, ..History::options(false) }).await;
        done(tools.import(!ours, &whole, &copy)).await;
        check_head(&tools, &mut history, &copy, &[]).await;
        copies.push(copy);

        done(tools.export(ours, &source, None, "s3", &base)).await;
        done(tools.export(ours, &source, Some("s3"), "s4", &last)).await;
        done(tools.export_point(ours, &source, Some("s4"), &head)).await;
        assert_eq!(header(&head).await, (Some("s4".into()), None, size));
        done(tools.merge(!ours, [&last, &head, &merged])).await;
        assert_eq!(header(&merged).await, (Some("s3".into()), None, size));
        let nothing_follows = run(tools.merge(true, [&head, &last, &tools.file("none")])).await.expect_code(4);
        assert!(nothing_follows.stderr.contains("leads to HEAD"), "{}", nothing_follows.stderr);
        for (part, diffs, snapshots) in
            [("steps", &[&base, &last, &head][..], &["s3", "s4"][..]), ("merged", &[&base, &merged], &["s3"])]
        {
            let copy = tools.image("sas", &format!("{label}-{part}"));
            history.disk.librbd.create(&copy, &CreateOptions { size: MIB, ..History::options(true) }).await;
            for diff in diffs {
                done(tools.import(!ours, diff, &copy)).await;
            }
            check_head(&tools, &mut history, &copy, snapshots).await;
            // HEAD is at no snapshot now: nothing is put on top of it, and it is not taken for a target of ours.
            let last = diffs[diffs.len() - 1];
            let refused = run(tools.import(true, last, &copy)).await.expect_code(4);
            assert!(refused.stderr.contains("import-diff --rewind"), "{}", refused.stderr);
            let mut again = tools.import(true, last, &copy);
            again.arg("--rewind");
            done(again).await;
            check_head(&tools, &mut history, &copy, snapshots).await;
            let sync = tools.poolshift(["sync", &format!("rbd:{source}"), &format!("rbd:{copy}")]);
            run(sync).await.expect_code(4);
            copies.push(copy);
        }
    }
    for from in [None, Some("s4"), Some("s1")] {
        let mut theirs = tools.rbd(["diff", "--format", "json", &source]);
        let mut ours = tools.poolshift(["diff", "--json", &format!("rbd:{source}")]);
        theirs.args(from.map(|from| ["--from-snap", from]).iter().flatten());
        ours.args(from.map(|from| ["--from", from]).iter().flatten());
        let theirs = extents(&run(theirs).await.expect_code(0).stdout);
        let ours = run(ours).await.expect_code(0);
        assert!(!ours.stdout.contains("consistent") && !ours.stderr.contains("moments"), "{}", ours.stderr);
        let content = history.points.iter().find(|(have, _)| Some(have.as_str()) == from);
        let found = extents(&ours.stdout);
        let fault = find_fault(content.map_or(&[][..], |(_, bytes)| bytes), &history.disk.bytes, &found);
        assert_eq!((fault, found), (None, normalize_extents(theirs)), "from {from:?} to HEAD");
    }
    history.remove(&copies).await;
}

/// A writer that has the image open is named, in words and in JSON; one that has gone is not.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_head_that_a_writer_has_open_is_read_with_a_warning() {
    let env = ceph();
    let tools = Tools::new(&env, "head-open");
    let image = tools.image("sata", "source");
    let mut disk = Disk::create(&env, &image, 9, &History::options(false)).await;
    disk.write_noise(0, MIB).await;
    disk.snapshot("a").await;
    disk.write_noise(MIB, MIB).await;
    let source = format!("rbd:{image}");
    let json = async |number: u32, source: &str| {
        let mut command = tools.poolshift(["export-diff", source, "--from", "a", "--json"]);
        command.arg(tools.file(&format!("diff-{number}")));
        let run = run(command).await.expect_code(0);
        (serde_json::from_str::<serde_json::Value>(&run.stdout).unwrap(), run.stderr)
    };
    let (report, stderr) = json(0, &source).await;
    assert_eq!((&report["consistent"], &report["snapshot"]), (&false.into(), &serde_json::Value::Null), "{report}");
    let warning = report["warning"].as_str().unwrap();
    assert!(warning.contains("has it open; the data may be of several moments"), "{warning}");
    assert!(stderr.contains(warning), "{stderr}");
    let listed = run(tools.poolshift(["diff", &source, "--from", "a", "--json"])).await.expect_code(0);
    assert!(listed.stdout.contains(r#""consistent":false"#) && listed.stderr.contains(warning), "{listed:?}");
    assert_eq!(extents(&listed.stdout).len(), 1, "rbd's fields are there as well");
    let listed = run(tools.poolshift(["diff", &source, "--from", "a"])).await.expect_code(0);
    assert!(!listed.stdout.contains("consistent") && listed.stderr.contains(warning), "{listed:?}");

    disk.librbd.call(format!("close {image}")).await;
    let (report, stderr) = json(1, &source).await;
    assert_eq!((&report["consistent"], &report["warning"]), (&true.into(), &serde_json::Value::Null), "{report}");
    assert!(!stderr.contains("moments"), "{stderr}");
    // A snapshot has no writer, whoever has the image open.
    disk.snapshot("b").await;
    let (report, stderr) = json(2, &format!("{source}@b")).await;
    assert_eq!((&report["consistent"], &report["snapshot"]), (&true.into(), &"b".into()), "{report}");
    assert!(!stderr.contains("moments"), "{stderr}");
    disk.librbd.remove(&[&image]).await;
}

/// `poolshift diff --json` says what `rbd diff --format json` says, sorted and with neighbours joined.
async fn same_listing(tools: &Tools, history: &History, striped: bool) {
    let image = &history.disk.image;
    let content = |name| history.points.iter().find(|(have, _)| have == name).map_or(&[][..], |(_, bytes)| bytes);
    for (from, to) in [(None, "s2"), (None, "s4"), (Some("s0"), "s1"), (Some("s1"), "s3"), (Some("s0"), "s4")] {
        let mut theirs = tools.rbd(["diff", "--format", "json"]);
        theirs.arg(format!("{image}@{to}"));
        let mut ours = tools.poolshift(["diff", "--json"]);
        ours.arg(format!("rbd:{image}@{to}"));
        if let Some(from) = from {
            theirs.args(["--from-snap", from]);
            ours.args(["--from", from]);
        }
        let theirs = extents(&run(theirs).await.expect_code(0).stdout);
        assert!(!theirs.is_empty());
        let ours = extents(&run(ours).await.expect_code(0).stdout);
        let fault = find_fault(content(from.unwrap_or("")), content(to), &ours);
        assert_eq!(fault, None, "from {from:?} to {to}, striped: {striped}");
        assert_eq!(ours, normalize_extents(theirs), "from {from:?} to {to}, striped: {striped}");
    }
}

/// rbd's workunit merge_diff: every pair of changes of one object, in all four ways to make and merge two diffs.
async fn merge_pairs(env: &CephEnv, tag: &str, sizes: [i64; 2]) {
    const OBJECT: u64 = 64 * KIB;
    // Offset, length and what is done: w(rite), d(iscard), z(ero).
    const CHANGES: [(u64, u64, char); 8] = [
        (0, 0, 'w'),
        (0, OBJECT, 'w'),
        (0, 5000, 'w'),
        (20_000, 5000, 'w'),
        (OBJECT - 5000, 5000, 'w'),
        (0, OBJECT, 'd'),
        (8192, OBJECT - 8192, 'd'),
        (4096, 30_001, 'z'),
    ];
    let tools = Tools::new(env, tag);
    let objects = 2 * CHANGES.len() * CHANGES.len();
    let size = objects as u64 * OBJECT;
    let options = CreateOptions { object_size: OBJECT, stripe_unit: OBJECT, ..CreateOptions::new(size) };
    let source = tools.image("sata", "source");
    let mut disk = Disk::create(env, &source, 5, &options).await;
    // The first half of the objects is there from the beginning, the second isn't.
    disk.write_noise(0, size / 2).await;
    let mut history = History { disk, parent: None, points: Vec::new() };
    history.snapshot("s0").await;
    for (round, divisor) in [(0, 1), (1, CHANGES.len())] {
        for object in 0..objects {
            let (offset, length, what) = CHANGES[object / divisor % CHANGES.len()];
            let offset = object as u64 * OBJECT + offset;
            let length = length.min(history.disk.size().saturating_sub(offset));
            match what {
                _ if length == 0 => {}
                'w' => history.disk.write_noise(offset, length).await,
                'd' => history.disk.discard(offset, length).await,
                _ => history.disk.zero(offset, length).await,
            }
        }
        if sizes[round] != 0 {
            let other = history.disk.size().checked_add_signed(sizes[round]).unwrap();
            history.disk.resize(other).await;
        }
        history.snapshot(&format!("s{}", round + 1)).await;
    }
    let base = tools.file("base");
    done(tools.export(true, &source, None, "s0", &base)).await;
    let mut copies = Vec::new();
    for (number, (made_by_us, merged_by_us)) in
        [(true, true), (true, false), (false, true), (false, false)].into_iter().enumerate()
    {
        let [first, second, out] = ["first", "second", "out"].map(|part| tools.file(&format!("{part}-{number}")));
        done(tools.export(made_by_us, &source, Some("s0"), "s1", &first)).await;
        done(tools.export(made_by_us, &source, Some("s1"), "s2", &second)).await;
        done(tools.merge(merged_by_us, [&first, &second, &out])).await;
        let copy = tools.image("sas", &format!("copy-{number}"));
        history.disk.librbd.create(&copy, &options).await;
        done(tools.import(merged_by_us, &base, &copy)).await;
        done(tools.import(!merged_by_us, &out, &copy)).await;
        history.check(&tools, &copy).await;
        copies.push(copy);
    }
    history.remove(&copies).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn every_pair_of_changes_is_merged_right() {
    let env = ceph();
    let (some, more) = (3 * 64 * KIB as i64 + 777, 5 * 64 * KIB as i64 + 12_345);
    futures::join!(
        merge_pairs(&env, "merge-same", [0, 0]),
        merge_pairs(&env, "merge-shrink-grow", [-some, more]),
        merge_pairs(&env, "merge-grow-shrink", [some, -more]),
    );
}

/// rbd's workunit diff_continuous: 30 increments of a striped image, piped from each program to the other.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn thirty_increments_are_piped_both_ways() {
    let env = ceph();
    let tools = Tools::new(&env, "continuous");
    let options = History::options(true);
    let source = tools.image("sata", "source");
    let copies = [tools.image("sas", "by-rbd"), tools.image("sas", "by-poolshift")];
    let mut disk = Disk::create(&env, &source, 7, &options).await;
    for copy in &copies {
        disk.librbd.create(copy, &options).await;
    }
    let mut readers = [Librbd::start(&env), Librbd::start(&env)];
    let (mut previous, mut expected) = (None::<String>, Vec::new());
    for number in 0..=30u32 {
        let carry = async |made_by_us: bool, copy: &str, reader: &mut Librbd| {
            let Some(number) = number.checked_sub(1) else { return };
            let (to, from) = (format!("s{number}"), previous.as_deref());
            let export = tools.export(made_by_us, &source, from, &to, Path::new(STDIO));
            pipe(export, tools.import(!made_by_us, Path::new(STDIO), copy)).await;
            assert!(reader.read(&format!("{copy}@{to}")).await == expected, "{copy}@{to}");
        };
        // The next snapshot is made while the one before is carried over.
        let next = async {
            if number < 30 {
                for _ in 0..4 {
                    disk.change(0).await;
                }
                if number % 7 == 3 {
                    let size = disk.random.u64(6 * MIB..10 * MIB);
                    disk.resize(size).await;
                }
                disk.snapshot(&format!("s{number}")).await;
            }
        };
        let [left, right] = &mut readers;
        futures::join!(next, carry(true, &copies[0], left), carry(false, &copies[1], right));
        previous = number.checked_sub(1).map(|number| format!("s{number}"));
        expected.clone_from(&disk.bytes);
    }
    assert_eq!(readers[0].snapshots(&copies[0]).await.len(), 30);
    disk.librbd.remove(&[&source, &copies[0], &copies[1]]).await;
}

/// poolshift's own stream, into a namespace: whole, in increments, cut, from a wrong base.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn send_and_receive_between_two_images() {
    let env = ceph();
    let tools = Tools::new(&env, "send");
    let mut history = History::new(&tools, false, true, 4).await;
    let (source, space) = (history.disk.image.clone(), format!("sas/{}", tools.tag));
    done(tools.rbd(["namespace", "create", &space])).await;
    let copy = format!("{space}/copy");
    let send = |from: Option<&str>, to: &str| {
        let mut command = tools.poolshift(["send", &format!("rbd:{source}@{to}")]);
        command.args(from.map(|from| ["--from", from]).iter().flatten());
        command
    };
    let receive = || tools.poolshift(["receive", &format!("rbd:{copy}")]);
    let receive_file = |bytes: &[u8]| {
        let file = tools.file("stream");
        std::fs::write(&file, bytes).unwrap();
        let mut command = receive();
        command.stdin(std::fs::File::open(file).unwrap());
        command
    };
    let stream = |from: Option<&str>, to: &str| {
        let mut command = send(from, to);
        async move { tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap().stdout }
    };
    pipe(send(None, "s0"), receive()).await;
    pipe(send(Some("s0"), "s1"), receive()).await;
    // From a base that it isn't at: refused, and nothing is touched.
    let refused = run(receive_file(&stream(Some("s2"), "s3").await)).await.expect_code(4);
    assert!(refused.stderr.contains("the stream starts from snapshot s2"), "{}", refused.stderr);
    // Cut in the middle, and with one bit wrong: no snapshot; then whole.
    let whole = stream(Some("s1"), "s2").await;
    run(receive_file(&whole[..whole.len() / 2])).await.expect_code(8);
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    run(receive_file(&flipped)).await.expect_code(8);
    let names = history.disk.librbd.snapshots(&copy).await;
    assert_eq!(names.last().map(String::as_str), Some("s1"));
    run(receive_file(&whole)).await.expect_code(0);
    pipe(send(Some("s2"), "s4"), receive()).await;
    history.check(&tools, &copy).await;
    // The same once more is no harm.
    pipe(send(Some("s2"), "s4"), receive()).await;
    history.remove(std::slice::from_ref(&copy)).await;
    done(tools.rbd(["namespace", "rm", &space])).await;
}
