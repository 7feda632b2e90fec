//! A real server on RBD, as `scripts/vm-dev` makes it, and the oracle that says whether its disks lack anything.
//!
//! The guest appends numbered lines to a log on each of its two disks and acknowledges a line on its console when it has
//! been brought to both; `scripts/vm-guest/init` describes what it prints and what it can be told.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::librbd::name;
use crate::support::{CephEnv, Turn, ceph, ceph_alone, required};

/// How long a guest may take for anything: it is emulated, on a host that has other things to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a line of a guest's log is: a page, so that no line brings an older one to the disk again.
const LINE: usize = 4096;

/// A libvirt of `scripts/vm-dev`, and the cluster that its guests' disks are on.
pub(crate) struct VmEnv {
    /// The cluster.
    pub(crate) ceph: CephEnv,
    folder: PathBuf,
    _turn: Arc<Turn>,
}

/// The libvirt and the cluster. One test at a time has its guests: an emulated one takes most of a core.
///
/// # Panics
/// If one is missing: `scripts/test` starts both.
#[track_caller]
pub(crate) fn vm() -> VmEnv {
    vm_on(ceph)
}

/// The same for a test that stops daemons or sets quotas: no other test uses the cluster meanwhile.
#[track_caller]
pub(crate) fn vm_alone() -> VmEnv {
    vm_on(ceph_alone)
}

#[track_caller]
fn vm_on(ceph: fn() -> CephEnv) -> VmEnv {
    let folder = PathBuf::from(required("POOLSHIFT_TEST_VM", "a libvirt"));
    let turn = Turn::take(&folder, "guests", true);
    VmEnv { ceph: ceph(), folder, _turn: turn }
}

/// Runs a command to its end and gives back its standard output.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Vec<u8> {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}\n{}", String::from_utf8_lossy(&stderr));
    stdout
}

#[track_caller]
pub(crate) fn run_for_text(command: &mut Command) -> String {
    String::from_utf8(run(command)).expect("the output is text")
}

/// Runs Ceph's own `rbd`.
#[track_caller]
pub(crate) fn rbd(ceph: &CephEnv, words: &[&str]) -> String {
    run_for_text(rbd_command(ceph).args(words))
}

/// Ceph's own `rbd`, for a cluster.
pub(crate) fn rbd_command(ceph: &CephEnv) -> Command {
    let mut command = Command::new("rbd");
    command.env_remove("CEPH_ARGS").arg("--conf").arg(&ceph.conf).arg("--id").arg(&ceph.user);
    command
}

/// The addresses of the clients that have an image open.
#[track_caller]
pub(crate) fn clients(ceph: &CephEnv, image: &str) -> Vec<String> {
    let status: serde_json::Value =
        serde_json::from_str(&rbd(ceph, &["status", "--format", "json", image])).expect("rbd prints JSON");
    let watchers = status["watchers"].as_array().expect("there is a list of watchers");
    watchers.iter().map(|watcher| watcher["address"].as_str().expect("it has an address").to_owned()).collect()
}

impl VmEnv {
    /// What to give to `virsh --connect`.
    pub(crate) fn uri(&self) -> String {
        format!("qemu+unix:///session?socket={}/r/libvirt/libvirt-sock", self.folder.display())
    }

    /// Runs virsh.
    #[track_caller]
    pub(crate) fn virsh(&self, words: &[&str]) -> String {
        run_for_text(Command::new("virsh").args(["--quiet", "--connect", &self.uri()]).args(words))
    }

    /// Runs Ceph's own `rbd`.
    #[track_caller]
    pub(crate) fn rbd(&self, words: &[&str]) -> String {
        rbd(&self.ceph, words)
    }

    /// How many clients have an image open.
    #[track_caller]
    pub(crate) fn watchers(&self, image: &str) -> usize {
        self.clients(image).len()
    }

    /// The addresses of the clients that have an image open.
    #[track_caller]
    pub(crate) fn clients(&self, image: &str) -> Vec<String> {
        clients(&self.ceph, image)
    }

    #[track_caller]
    fn vm_dev(&self, words: &[&str], guest: &Guest<'_>) {
        let (base, name) = (self.folder.parent(), self.folder.file_name());
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/vm-dev"));
        command.env("POOLSHIFT_VM_DIR", base.expect("a folder of libvirts")).args(words);
        command.arg("--name").arg(name.expect("the libvirt has a name"));
        command.arg("--ceph-conf").arg(&self.ceph.conf).args(["--ceph-user", &self.ceph.user]);
        for disk in &guest.disks {
            command.args([format!("--{}", disk.role.name()), format!("rbd:{}", disk.source)]);
        }
        run(&mut command);
    }
}

/// Which of its two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The one it boots from.
    Root,
    /// The other.
    Data,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Data => "data",
        }
    }
}

/// A disk of a guest.
#[derive(Debug)]
pub(crate) struct GuestDisk {
    pub(crate) role: Role,
    /// The image on SATA that it is made with, `POOL/IMAGE`.
    pub(crate) source: String,
    /// The image on SAS that a test may make of it; removed with the guest.
    pub(crate) target: String,
}

/// A domain of libvirt. Dropped, it is destroyed and undefined, and its images are removed.
pub(crate) struct Guest<'a> {
    env: &'a VmEnv,
    /// The domain's name.
    pub(crate) name: String,
    pub(crate) disks: [GuestDisk; 2],
    terminal: Terminal,
}

impl std::ops::Deref for Guest<'_> {
    type Target = Terminal;

    fn deref(&self) -> &Terminal {
        &self.terminal
    }
}

impl<'a> Guest<'a> {
    /// Imports the two disks into `sata`, and defines a domain on them. It is not started.
    #[track_caller]
    pub(crate) fn make(env: &'a VmEnv, tag: &str) -> Self {
        let name = name(tag);
        let disk = |role: Role| {
            let image = format!("{name}-{}", role.name());
            GuestDisk { role, source: format!("sata/{image}"), target: format!("sas/{image}") }
        };
        let console = |ending: &str| env.folder.join("console").join(format!("{name}.{ending}"));
        let socket = Socket { log: console("log"), socket: console("sock") };
        let terminal = Terminal::new(&name, Box::new(socket));
        let guest = Self { env, disks: [disk(Role::Root), disk(Role::Data)], name, terminal };
        env.vm_dev(&["import"], &guest);
        env.vm_dev(&["domain", &guest.name], &guest);
        guest
    }

    /// Starts it and waits until it takes commands.
    #[track_caller]
    pub(crate) fn start(&self) {
        let ready = |console: &Console| console.all("READY").count();
        let before = ready(&self.console());
        self.env.virsh(&["start", &self.name]);
        self.wait_for("the guest to boot", |console| (ready(console) > before).then_some(()));
    }

    /// Presses the power button and waits until the domain has exited.
    #[track_caller]
    pub(crate) fn shut_down(&self) {
        self.env.virsh(&["shutdown", &self.name, "--mode", "acpi"]);
        let deadline = Instant::now() + PATIENCE;
        while self.state() != "shut off" {
            assert!(Instant::now() < deadline, "{} ignores the power button\n{}", self.name, self.console().tail());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// `running`, `paused`, `shut off` and so on, as libvirt names it.
    #[track_caller]
    pub(crate) fn state(&self) -> String {
        self.env.virsh(&["domstate", &self.name]).trim().to_owned()
    }

    /// The RBD images that libvirt has for its disks now.
    #[track_caller]
    pub(crate) fn sources_live(&self) -> Vec<String> {
        rbd_sources(&self.env.virsh(&["dumpxml", &self.name]))
    }

    /// The RBD images that it will have at its next start.
    #[track_caller]
    pub(crate) fn sources_inactive(&self) -> Vec<String> {
        rbd_sources(&self.env.virsh(&["dumpxml", "--inactive", &self.name]))
    }

    fn console_file(&self, ending: &str) -> PathBuf {
        self.env.folder.join("console").join(format!("{}.{ending}", self.name))
    }

    fn clean_up(&self) {
        let quietly = |result: std::io::Result<Output>| match result {
            Ok(output) if output.status.success() => true,
            other => {
                eprintln!("cleaning up {}: {other:?}", self.name);
                false
            }
        };
        let virsh =
            |words: &[&str]| Command::new("virsh").args(["--quiet", "--connect", &self.env.uri()]).args(words).output();
        // One that does not run can't be destroyed.
        let _ = virsh(&["destroy", &self.name]);
        quietly(virsh(&["undefine", &self.name, "--managed-save"]));
        let rbd = |words: &[&str]| rbd_command(&self.env.ceph).args(words).output();
        for image in self.disks.iter().flat_map(|disk| [&disk.source, &disk.target]) {
            if rbd(&["info", image]).is_ok_and(|output| output.status.success()) {
                quietly(rbd(&["snap", "purge", "--no-progress", image]));
                quietly(rbd(&["rm", "--no-progress", image]));
            }
        }
        for ending in ["log", "sock"] {
            let _ = std::fs::remove_file(self.console_file(ending));
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the console of {}, at last:\n{}", self.name, self.console().tail());
        }
        self.clean_up();
    }
}

/// Where a guest prints, and hears.
pub(crate) trait Line: Send {
    /// All that came so far.
    fn printed(&self) -> Vec<u8>;

    /// To be written to, and read without waiting, until it is answered.
    fn open(&self) -> Box<dyn Conversation>;
}

/// What is said to a guest, and what it says at the same time.
pub(crate) trait Conversation: Read + Write {}

impl<T: Read + Write> Conversation for T {}

/// The console of a domain of `scripts/vm-dev`.
struct Socket {
    log: PathBuf,
    socket: PathBuf,
}

impl Line for Socket {
    fn printed(&self) -> Vec<u8> {
        // Not there before the first start.
        std::fs::read(&self.log).unwrap_or_default()
    }

    fn open(&self) -> Box<dyn Conversation> {
        let socket = UnixStream::connect(&self.socket).expect("the console is a socket");
        socket.set_nonblocking(true).expect("a socket can be set");
        Box::new(socket)
    }
}

/// A guest's console, with someone at it.
pub(crate) struct Terminal {
    name: String,
    line: Box<dyn Line>,
}

impl Terminal {
    pub(crate) fn new(name: &str, line: Box<dyn Line>) -> Self {
        Self { name: name.to_owned(), line }
    }

    /// All that it has printed so far.
    pub(crate) fn console(&self) -> Console {
        Console::parse(&String::from_utf8_lossy(&self.line.printed()))
    }

    /// The same as it came.
    pub(crate) fn printed(&self) -> Vec<u8> {
        self.line.printed()
    }

    /// Waits until what is on the console satisfies `found`.
    #[track_caller]
    pub(crate) fn wait_for<T>(&self, what: &str, found: impl Fn(&Console) -> Option<T>) -> T {
        self.wait_while_doing(what, found, || ())
    }

    #[track_caller]
    fn wait_while_doing<T>(&self, what: &str, found: impl Fn(&Console) -> Option<T>, mut work: impl FnMut()) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            work();
            let console = self.console();
            if let Some(found) = found(&console) {
                return found;
            }
            for word in ["FATAL", "FAILED", "LOSS"] {
                let bad = console.all(word).next();
                assert!(bad.is_none(), "{}, waiting for {what}: {bad:?}\n{}", self.name, console.tail());
            }
            assert!(Instant::now() < deadline, "{}: waited too long for {what}\n{}", self.name, console.tail());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until line `number` is acknowledged.
    #[track_caller]
    pub(crate) fn wait_for_ack(&self, number: u64) {
        self.wait_for(&format!("ACK {number}"), |console| (console.last_ack() >= number).then_some(()));
    }

    /// Has the guest do something, and gives back what it printed meanwhile, the `DONE` last.
    #[track_caller]
    pub(crate) fn command(&self, words: &str) -> Vec<Record> {
        let name = words.split(' ').next().unwrap_or_default();
        let before = self.console().records.len();
        let mut conversation = self.line.open();
        conversation.write_all(format!("{words}\n").as_bytes()).expect("the console takes a line");
        let answer = |console: &Console| {
            let new = &console.records[before..];
            let end = new
                .iter()
                .position(|record| record.word == "DONE" && record.rest.first().is_some_and(|w| w == name))?;
            Some(new[..=end].to_vec())
        };
        // What nobody reads would fill it, and then the guest could print nothing more, also not to its log.
        self.wait_while_doing(&format!("{words:?} to be done"), answer, || {
            let mut buffer = [0; 4096];
            while conversation.read(&mut buffer).is_ok_and(|length| length > 0) {}
        })
    }

    /// What the guest reads in its logs, from the disks and not from its memory.
    #[track_caller]
    pub(crate) fn check(&self) -> [Log; 2] {
        let answer = self.command("check");
        [Role::Root, Role::Data].map(|role| {
            let of = |record: &&Record| record.word == "CHECK" && record.field("disk") == Some(role.name());
            let record = answer.iter().find(of).unwrap_or_else(|| panic!("{role:?} is missing in {answer:?}"));
            Log { lines: record.number("lines"), last: record.number("last"), bad: record.number("bad") }
        })
    }

    /// Whether its disks hold all that it has acknowledged; the writer pauses for that.
    ///
    /// # Errors
    /// What is wrong.
    #[track_caller]
    pub(crate) fn oracle(&self) -> Result<(), String> {
        self.command("stop");
        let console = self.console();
        let verdict = oracle(console.last_ack(), self.check()).and_then(|()| console.is_in_order());
        self.command("go");
        verdict
    }
}

/// The names in `<source protocol='rbd' name='…'>`, in the order of the disks.
pub(crate) fn rbd_sources(xml: &str) -> Vec<String> {
    xml.split("<source protocol='rbd' name='")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once('\'')?.0.to_owned()))
        .collect()
}

/// One line `GUEST WORD …` of a console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) word: String,
    pub(crate) rest: Vec<String>,
}

impl Record {
    fn parse(line: &str) -> Option<Self> {
        let mut words =
            line.trim_end_matches('\r').strip_prefix("GUEST ")?.strip_suffix(" .")?.split(' ').map(str::to_owned);
        Some(Self { word: words.next()?, rest: words.collect() })
    }

    /// The value of `key=value`.
    pub(crate) fn field(&self, key: &str) -> Option<&str> {
        self.rest.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    #[track_caller]
    fn number(&self, key: &str) -> u64 {
        let number = self.field(key).and_then(|value| value.parse().ok());
        number.unwrap_or_else(|| panic!("{key} is missing in {self:?}"))
    }
}

/// What a guest has printed, over all its boots.
#[derive(Debug)]
pub(crate) struct Console {
    text: String,
    records: Vec<Record>,
}

impl Console {
    /// A record counts when it is there to its full stop and the end of its line: the last one may be half printed, and
    /// the kernel may have spoken in between.
    fn parse(text: &str) -> Self {
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Self { text: text.to_owned(), records: whole.lines().filter_map(Record::parse).collect() }
    }

    pub(crate) fn all<'c>(&'c self, word: &'c str) -> impl Iterator<Item = &'c Record> {
        self.records.iter().filter(move |record| record.word == word)
    }

    /// The last line that was acknowledged; 0 before the first.
    pub(crate) fn last_ack(&self) -> u64 {
        self.all("ACK").last().and_then(|record| record.rest.first()?.parse().ok()).unwrap_or(0)
    }

    /// Whether no line was acknowledged twice. A guest that starts from a disk that has lost lines writes them again.
    ///
    /// # Errors
    /// Which ones were.
    fn is_in_order(&self) -> Result<(), String> {
        let acked = self.all("ACK").filter_map(|record| record.rest.first()?.parse::<u64>().ok()).collect::<Vec<_>>();
        match acked.windows(2).find(|pair| pair[1] <= pair[0]) {
            Some(pair) => Err(format!("line {} was acknowledged, and then {} came", pair[0], pair[1])),
            None => Ok(()),
        }
    }

    /// The ids of its boots: a guest that was saved and restored has booted once.
    pub(crate) fn boot_ids(&self) -> Vec<&str> {
        self.all("BOOT").filter_map(|record| record.field("id")).collect()
    }

    pub(crate) fn tail(&self) -> String {
        let lines: Vec<&str> = self.text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// What there is of a guest's log on one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) lines: u64,
    /// The number of the last line.
    pub(crate) last: u64,
    /// The first line that is not what was written; 0 if all are.
    pub(crate) bad: u64,
}

impl Log {
    fn parse(content: &str) -> Self {
        let mut log = Self::default();
        for line in content.split_terminator('\n') {
            log.lines += 1;
            let number = || {
                let whole = (line.len() == LINE - 1).then_some(line)?;
                let (number, boot) = whole.strip_prefix("seq=")?.strip_suffix(" end")?.split_once(" boot=")?;
                boot.trim_end().parse::<u64>().ok()?;
                number.parse().ok()
            };
            match number() {
                Some(number) if number == log.lines => log.last = number,
                _ if log.bad == 0 => log.bad = log.lines,
                _ => {}
            }
        }
        log
    }
}

/// Whether the two logs, of the root and of the data disk, hold all that was acknowledged, and nothing that can't have
/// been written: up to one line more, as a stop may fall between the writes and the acknowledgement.
///
/// # Errors
/// What is wrong.
pub(crate) fn oracle(acked: u64, [root, data]: [Log; 2]) -> Result<(), String> {
    for (disk, Log { lines, last, bad }) in [("root", root), ("data", data)] {
        if bad != 0 {
            return Err(format!("{disk}: line {bad} of {lines} is not what was written"));
        }
        if last < acked {
            return Err(format!("{disk}: lost {} acknowledged lines, {} to {acked}", acked - last, last + 1));
        }
        if last > acked + 1 {
            return Err(format!("{disk}: has line {last}, but only {acked} were acknowledged"));
        }
    }
    if data.last > root.last {
        return Err(format!(
            "data has line {}, which is written to root first, but root ends at {}",
            data.last, root.last
        ));
    }
    Ok(())
}

/// The log in a disk that no guest uses, `POOL/IMAGE@SNAPSHOT`: exported, its file system's journal replayed as a boot
/// would do it, and read without any of the guest's code.
#[track_caller]
pub(crate) fn inspect(env: &VmEnv, role: Role, image: &str) -> Log {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("disk");
    env.rbd(&["export", "--no-progress", image, file.to_str().expect("a path of text")]);
    let mut disk = std::fs::read(&file).expect("the export can be read");
    if role == Role::Root {
        disk = second_partition(&disk);
        std::fs::write(&file, &disk).expect("the partition can be written");
    }
    let tool = |name: &str| {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("env");
        command.arg(format!("PATH={path}")).arg(name);
        command
    };
    let checked = tool("e2fsck").arg("-fy").arg(&file).output().expect("e2fsck starts");
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{image}: {}", String::from_utf8_lossy(&checked.stdout));
    let log = Path::new(if role == Role::Root { "/state/log" } else { "/log" });
    Log::parse(&run_for_text(tool("debugfs").arg("-R").arg(format!("cat {}", log.display())).arg(&file)))
}

fn second_partition(disk: &[u8]) -> Vec<u8> {
    let entry = &disk[446 + 16..][..16];
    let sectors = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes")) as usize;
    disk[sectors(8) * 512..][..sectors(12) * 512].to_vec()
}

#[test]
fn the_oracle_knows_loss_when_it_sees_it() {
    let line = |number| format!("{:1$} end\n", format!("seq={number} boot=1"), LINE - 5);
    let log = |lines: std::ops::RangeInclusive<u64>| Log::parse(&lines.map(line).collect::<String>());
    assert_eq!(log(1..=30), Log { lines: 30, last: 30, bad: 0 });
    assert_eq!(oracle(30, [log(1..=30), log(1..=30)]), Ok(()));
    assert_eq!(oracle(29, [log(1..=30), log(1..=29)]), Ok(()), "a stop between the two writes of a line");
    let lost = |acked, root, data| oracle(acked, [root, data]).unwrap_err();
    assert!(lost(30, log(1..=30), log(1..=28)).contains("data: lost 2 acknowledged lines, 29 to 30"));
    assert!(lost(28, log(1..=30), log(1..=30)).contains("root: has line 30"));
    assert!(lost(30, log(2..=30), log(1..=30)).contains("root: line 1 of 29"));
    assert!(lost(29, log(1..=29), log(1..=30)).contains("data has line 30"));
    assert!(lost(1, Log::parse("seq=1 boot=1 end\n"), log(1..=1)).contains("root: line 1 of 1"));
    assert_eq!(Log::parse(&format!("{}{}\n", line(1), "\0".repeat(LINE - 1))).bad, 2);
}

#[test]
fn a_torn_record_counts_for_nothing() {
    let console = Console::parse(
        "GUEST BOOT n=1 id=abc .\r\nGUEST ACK 11 .\r\nGUEST ACK 12\r\n[ 3.1] GUEST ACK 13 .\r\nGUEST ACK 14 .",
    );
    assert_eq!(console.last_ack(), 11);
    assert_eq!(console.boot_ids(), ["abc"]);
    assert_eq!(console.all("BOOT").next().unwrap().number("n"), 1);
}

#[test]
fn a_guest_that_writes_lost_lines_again_is_found() {
    let console = |acks: [u64; 3]| Console::parse(&acks.map(|ack| format!("GUEST ACK {ack} .\r\n")).concat());
    assert_eq!(console([11, 12, 14]).is_in_order(), Ok(()), "a line whose acknowledgement was cut");
    assert!(console([11, 12, 12]).is_in_order().unwrap_err().contains("line 12 was acknowledged"));
    assert!(console([11, 12, 5]).is_in_order().unwrap_err().contains("and then 5 came"));
}
