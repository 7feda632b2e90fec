//! A cycle is stopped after each of its steps, with the side files as a crash may leave them.

use std::process::Command;

use super::*;

const BLOCKS: usize = 4;

/// What was not synced may be lost.
#[derive(Clone, Copy, Debug)]
enum Lost {
    Nothing,
    /// No update of the digests since the last commit reached the disk.
    Digests,
    /// The first half of the digests did, the second did not.
    HalfTheDigests,
    /// The data did not (the times of the file are others then, as after any crash).
    Data,
}

const STEPS: usize = 8;

/// The first `steps` steps of a cycle that brings the image from `noise(1)` to `noise(2)` in two of its blocks.
async fn cycle(path: &Path, base: &Snapshot, steps: usize) -> Option<Snapshot> {
    let image = leased(path).await;
    let wanted = noise(2, BLOCKS * BLOCK as usize);
    let block = |index: usize| wanted.slice(index * BLOCK as usize..(index + 1) * BLOCK as usize);
    let mut done = None;
    for step in 0..steps {
        match step {
            0 => image.store_state("in flight").await.unwrap(),
            1 => image.remove_snapshot(base).await.unwrap(),
            2 => image.write(BLOCK, block(1)).await.unwrap(),
            3 => image.write(3 * BLOCK, block(3).slice(..100)).await.unwrap(),
            4 => image.write(3 * BLOCK + 100, block(3).slice(100..)).await.unwrap(),
            5 => image.flush().await.unwrap(),
            6 => done = Some(image.create_snapshot("next").await.unwrap()),
            _ => image.store_state("done").await.unwrap(),
        }
    }
    done
}

async fn crash_after(steps: usize, lost: Lost) {
    let folder = folder();
    let path = disk(&folder);
    let digests = folder.path().join("disk.poolshift.digests");
    let image = created(&path, BLOCKS as u64 * BLOCK).await;
    image.write(0, noise(1, BLOCKS * BLOCK as usize)).await.unwrap();
    let base = image.create_snapshot("base").await.unwrap();
    drop(image);
    let (old_digests, old_data) = (fs::read(&digests).unwrap(), fs::read(&path).unwrap());

    let next = cycle(&path, &base, steps).await;
    let context = format!("after {steps} steps, lost {lost:?}");
    // What create_snapshot has synced can't be lost.
    if next.is_none() {
        let new_digests = fs::read(&digests).unwrap();
        assert_eq!(new_digests.len(), old_digests.len());
        match lost {
            Lost::Nothing => {}
            Lost::Digests => fs::write(&digests, &old_digests).unwrap(),
            Lost::HalfTheDigests => {
                let half = 4096 + 2 * 32;
                fs::write(&digests, [&new_digests[..half], &old_digests[half..]].concat()).unwrap();
            }
            Lost::Data if steps > 2 => fs::write(&path, &old_data).unwrap(),
            Lost::Data => {}
        }
    }
    fs::write(folder.path().join("disk.poolshift.new"), b"{\"version\":1,\"crc").unwrap();

    let image = leased(&path).await;
    assert!(!folder.path().join("disk.poolshift.new").exists(), "{context}");
    let listed = image.snapshots().await.unwrap();
    match &next {
        Some(next) => {
            assert_eq!(&listed, std::slice::from_ref(next), "{context}");
            assert!(!image.head_differs(next).await.unwrap(), "{context}");
        }
        None if steps < 2 => {
            assert_eq!(listed, std::slice::from_ref(&base), "{context}");
            assert!(!image.head_differs(&base).await.unwrap(), "{context}");
        }
        None => assert!(listed.is_empty(), "{context}"),
    }
    let state = image.load_state().await.unwrap();
    assert_eq!(state.as_deref(), [None, Some("in flight"), Some("done")][usize::from(steps > 0) + steps / STEPS]);
    // The one thing that must never happen: a block passes as equal that isn't.
    for seed in [1, 2] {
        let (wanted, there) = (noise(seed, BLOCKS * BLOCK as usize), fs::read(&path).unwrap());
        let differs = |block: &ByteRange| {
            let bytes = block.offset() as usize..block.end() as usize;
            wanted[bytes.clone()] != there[bytes]
        };
        let expected = range(0, BLOCKS as u64 * BLOCK).split_at_multiples(BLOCK).filter(differs).collect();
        let found = image.differing_blocks(0, &wanted).await.unwrap();
        assert_eq!(found, crate::extent::normalize(expected), "{context}, seed {seed}");
    }
}

#[tokio::test]
async fn a_crash_at_any_step_leaves_nothing_wrong() {
    for steps in 0..=STEPS {
        for lost in [Lost::Nothing, Lost::Digests, Lost::HalfTheDigests, Lost::Data] {
            crash_after(steps, lost).await;
        }
    }
}

/// The engine forgot to withdraw the snapshot: the first write marks it, durably, before it lands.
#[tokio::test]
async fn a_write_without_a_withdrawal_is_on_record_before_it_lands() {
    let folder = folder();
    let path = disk(&folder);
    let image = created(&path, BLOCK).await;
    image.write(0, noise(1, BLOCK as usize)).await.unwrap();
    let snapshot = image.create_snapshot("s").await.unwrap();
    // No sidecar can be stored: then nothing may be written.
    let obstacle = folder.path().join("disk.poolshift.new");
    fs::create_dir(&obstacle).unwrap();
    assert!(image.write(0, noise(2, 10)).await.is_err());
    assert!(image.write_zeroes(range(0, 10)).await.is_err());
    assert!(image.resize(10).await.is_err());
    assert_eq!(fs::read(&path).unwrap(), noise(1, BLOCK as usize));
    assert!(!image.head_differs(&snapshot).await.unwrap());
    fs::remove_dir(&obstacle).unwrap();
    image.write(0, noise(2, 10)).await.unwrap();
    let sidecar = fs::read_to_string(folder.path().join("disk.poolshift")).unwrap();
    assert!(sidecar.contains(r#""dirty":true"#), "{sidecar}");
}

#[tokio::test]
async fn damaged_digests_cost_a_look_and_nothing_else() {
    let folder = folder();
    let path = disk(&folder);
    let digests = folder.path().join("disk.poolshift.digests");
    let content = noise(1, BLOCKS * BLOCK as usize);
    let image = created(&path, BLOCKS as u64 * BLOCK).await;
    image.write(0, content.clone()).await.unwrap();
    image.create_snapshot("s").await.unwrap();
    drop(image);
    let good = fs::read(&digests).unwrap();
    let mut flipped = good.clone();
    flipped[20] ^= 1;
    for bad in [&good[..0], &good[..30], &good[..4096], &good[..4096 + 40], &flipped] {
        fs::write(&digests, bad).unwrap();
        let image = leased(&path).await;
        let found = image.differing_blocks(0, &content).await.unwrap();
        // An entry that was cut in the middle is some digest, of nothing: that block is written again.
        assert!(found.is_empty() || (bad.len() == 4096 + 40 && found == [range(BLOCK, BLOCK)]), "{found:?}");
        let mut other = content.to_vec();
        other[5] ^= 1;
        assert!(image.differing_blocks(0, &other.into()).await.unwrap()[0].offset() == 0);
    }
    fs::remove_file(&digests).unwrap();
    assert!(leased(&path).await.differing_blocks(0, &content).await.unwrap().is_empty());
}

/// What is known is not read again: the proof is a target whose bytes were changed behind everybody's back.
#[tokio::test]
async fn kept_digests_save_reading_the_target() {
    let folder = folder();
    let path = disk(&folder);
    let content = noise(1, BLOCKS * BLOCK as usize);
    let image = created(&path, BLOCKS as u64 * BLOCK).await;
    image.write(0, content.slice(..2 * BLOCK as usize)).await.unwrap();
    image.write(2 * BLOCK, content.slice(2 * BLOCK as usize..3 * BLOCK as usize - 1)).await.unwrap();
    let behind = fs::File::options().write(true).open(&path).unwrap();
    behind.write_all_at(&[0; 10], 0).unwrap();
    let found = image.differing_blocks(0, &content).await.unwrap();
    assert_eq!(found, [range(2 * BLOCK, 2 * BLOCK)], "the first two are known, the others were read");
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_full_disk_leaves_the_old_state() {
    let folder = folder();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=512k", "tmpfs"]).arg(folder.path()).output();
    let mount = mount.unwrap();
    assert!(mount.status.success(), "this test mounts a tmpfs, as root: {mount:?}");
    let path = disk(&folder);
    let outcome = tokio::spawn(fill_the_disk(path)).await;
    let unmounted = Command::new("umount").arg("-l").arg(folder.path()).status().unwrap();
    assert!(unmounted.success());
    outcome.unwrap();
}

async fn fill_the_disk(path: PathBuf) {
    let folder = path.parent().unwrap();
    let image = created(&path, 4 << 20).await;
    image.store_state("old").await.unwrap();
    image.write(0, noise(1, BLOCK as usize)).await.unwrap();
    let snapshot = image.create_snapshot("s").await.unwrap();
    let filler = fs::File::create(folder.join("filler")).unwrap();
    let mut length = 0;
    while filler.write_all_at(&[1; 4096], length).is_ok() {
        length += 4096;
    }
    let error = image.store_state(&"n".repeat(10_000)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSpace);
    assert!(!folder.join("disk.poolshift.new").exists());
    assert_eq!(kind(image.write(2 * BLOCK, noise(2, BLOCK as usize)).await), ErrorKind::NoSpace);
    assert!(!image.head_differs(&snapshot).await.unwrap(), "the mark could not be stored, so nothing was written");
    // With room for the mark, but not for the data.
    filler.set_len(length - 8192).unwrap();
    assert_eq!(kind(image.write(2 * BLOCK, noise(2, BLOCK as usize)).await), ErrorKind::NoSpace);
    assert!(image.head_differs(&snapshot).await.unwrap());
    assert_eq!(image.load_state().await.unwrap().as_deref(), Some("old"));
    drop(image);
    let image = leased(&path).await;
    assert_eq!(image.load_state().await.unwrap().as_deref(), Some("old"));
    let there: Bytes = fs::read(&path).unwrap().into();
    assert!(image.differing_blocks(0, &there).await.unwrap().is_empty());
    filler.set_len(0).unwrap();
    image.store_state("new").await.unwrap();
    assert_eq!(image.load_state().await.unwrap().as_deref(), Some("new"));
}
