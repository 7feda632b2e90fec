//! XML as libvirt gives it, odd XML, and no XML.

use proptest::prelude::*;

use super::*;

/// `virsh dumpxml` of a running guest of `scripts/vm-dev`, with libvirt 9.0.
const LIVE: &str = include_str!("tests/live.xml");

fn disks() -> Vec<ServerDisk> {
    let disk = |volume: &str, boot| ServerDisk {
        target_in_use: None,
        volume: volume.into(),
        source: format!("rbd:sata/guest-{volume}").parse().unwrap(),
        target: format!("rbd:sas/tenant/guest-{volume}").parse().unwrap(),
        boot,
    };
    vec![disk("data", false), disk("root", true)]
}

/// A domain with one disk, of which `inside` stands beside its source and `more` in it.
fn one(name: &str, inside: &str, more: &str) -> String {
    format!(
        "<domain type='kvm'><devices><disk type='network' device='disk'><driver name='qemu' type='raw'/>{inside}\
         <source name=\"{name}\" protocol='rbd'>{more}</source><target dev='vda'/></disk></devices></domain>"
    )
}

#[test]
fn a_domain_of_libvirts_is_given_the_other_side_and_nothing_else_changes() {
    let moved = on_side(LIVE, &disks(), Side::Target).unwrap();
    let expected = LIVE
        .replace("name='sata/guest-root'", "name='sas/tenant/guest-root'")
        .replace("name='sata/guest-data'", "name='sas/tenant/guest-data'");
    assert_eq!(moved, expected);
    assert_eq!(on_side(&moved, &disks(), Side::Target).unwrap(), moved);
    assert_eq!(on_side(&moved, &disks(), Side::Source).unwrap(), LIVE);
    let (here, there) = (Domain::read(LIVE, &disks()).unwrap(), Domain::read(&moved, &disks()).unwrap());
    assert_eq!((here.side(2), there.side(2)), (Some(Side::Source), Some(Side::Target)));
    assert_eq!((here.kind.as_str(), here.on_poweroff.as_str(), here.unsaveable.len()), ("qemu", "destroy", 0));
    let root = &here.disks[0];
    assert_eq!((root.device.as_str(), root.volume, root.more), ("vda", Some((1, Side::Source)), None));
    assert!(root.auth && root.discard && !root.sliced);
}

#[test]
fn a_domain_between_the_sides_is_on_none_and_can_be_brought_to_either() {
    let half = LIVE.replace("sata/guest-root", "sas/tenant/guest-root");
    assert_eq!(Domain::read(&half, &disks()).unwrap().side(2), None);
    assert_eq!(on_side(&half, &disks(), Side::Source).unwrap(), LIVE);
}

#[test]
fn volumes_that_are_not_there_once_are_named() {
    let error = |xml: &str| on_side(xml, &disks(), Side::Target).unwrap_err().to_string();
    let missing = error(&LIVE.replace("sata/guest-data", "sata/other"));
    assert_eq!(missing, "none of its disks is volume data: not sata/guest-data, and not sas/tenant/guest-data");
    let twice = error(&LIVE.replace("sata/guest-data", "sas/tenant/guest-root"));
    assert!(twice.contains("volume data"), "{twice}");
    let both = LIVE.replace("sata/guest-data", "sata/guest-root");
    let only_root = vec![disks().remove(1)];
    let twice = on_side(&both, &only_root, Side::Target).unwrap_err().to_string();
    assert_eq!(twice, "its disks vda and vdb are both volume root");
    assert_eq!(Domain::read(&both, &only_root).unwrap().side(1), None);
    let mut file = disks();
    file[0].source = "file:/a/b".parse().unwrap();
    assert!(on_side(LIVE, &file, Side::Target).unwrap_err().to_string().contains("volume data is a file"));
}

#[test]
fn a_disk_that_is_more_than_an_image_is_told() {
    let disk = |inside: &str, more: &str| Domain::read(&one("p/i", inside, more), &[]).unwrap().disks.remove(0);
    assert_eq!(disk("", "").more, None);
    // A running domain has an empty one.
    assert_eq!(disk("<backingStore/>", "").more, None);
    assert!(disk("<backingStore type='file'><source file='/a'/></backingStore>", "").more.is_some());
    assert!(disk("<encryption format='luks'/>", "").more.is_some());
    assert!(disk("", "<encryption format='luks'/>").more.is_some());
    assert!(disk("", "<snapshot name='s'/>").more.is_some());
    assert!(disk("<mirror type='network'/>", "").more.is_some());
    assert!(disk("<shareable/>", "").more.is_some());
    assert!(disk("<transient/>", "").more.is_some());
    assert!(disk("", "<slices><slice type='storage' offset='0' size='1'/></slices>").sliced);
    let qcow2 = one("p/i", "", "").replace("'raw'", "'qcow2'");
    assert!(Domain::read(&qcow2, &[]).unwrap().disks[0].more.is_some());
}

#[test]
fn what_can_t_be_saved_is_told() {
    let xml = "<domain type='kvm'><on_poweroff>restart</on_poweroff><cpu><feature name='invtsc' policy='require'/>\
               </cpu><devices><hostdev type='pci'/><interface type='hostdev'/><interface type='bridge'/>\
               <filesystem/><shmem/></devices><launchSecurity type='sev'/></domain>";
    let domain = Domain::read(xml, &[]).unwrap();
    assert_eq!(domain.unsaveable.len(), 6, "{:?}", domain.unsaveable);
    assert_eq!(domain.on_poweroff, "restart");
}

#[test]
fn names_are_escaped_and_unescaped() {
    let mut disk = disks().remove(0);
    disk.source = "rbd:p/a&b".parse().unwrap();
    disk.target = "rbd:q/<'\">".parse().unwrap();
    let xml = one("p/a&amp;b", "", "");
    let moved = on_side(&xml, &[disk.clone()], Side::Target).unwrap();
    assert_eq!(moved, xml.replace("p/a&amp;b", "q/&lt;&apos;&quot;&gt;"));
    assert_eq!(on_side(&moved, &[disk], Side::Source).unwrap(), xml);
}

#[test]
fn hostile_xml_is_refused() {
    let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;'>]><domain>&b;</domain>";
    let wide = format!("<domain>{}</domain>", "<a/>".repeat(100_000));
    let deep = format!("<domain>{}{}</domain>", "<a>".repeat(60_000), "</a>".repeat(60_000));
    for xml in ["", "<", "<domain", "no", "<volume/>", "\0", bomb, &wide, &deep] {
        assert!(matches!(Domain::read(xml, &disks()), Err(XmlError::Damaged(_))), "{:.40}", xml);
    }
    let deep = format!("<domain>{}{}</domain>", "<a>".repeat(40_000), "</a>".repeat(40_000));
    assert!(Domain::read(&deep, &disks()).unwrap().disks.is_empty());
    let not_rbd = one("sata/guest-root", "", "").replace("'rbd'", "'iscsi'");
    assert!(Domain::read(&not_rbd, &disks()).unwrap().disks.is_empty());
}

proptest! {
    #[test]
    fn nothing_makes_it_panic(text in ".{0,200}", at in any::<prop::sample::Index>(), length in 0_usize..40) {
        let _ = on_side(&text, &disks(), Side::Target);
        let mut broken: Vec<char> = LIVE.chars().collect();
        let at = at.index(broken.len());
        let end = (at + length).min(broken.len());
        broken.splice(at..end, text.chars());
        let broken: String = broken.into_iter().collect();
        if let Ok(moved) = on_side(&broken, &disks(), Side::Target) {
            prop_assert_eq!(Domain::read(&moved, &disks()).unwrap().side(2), Some(Side::Target));
        }
    }
}
