use std::process::Command;

use super::*;

/// A loop device over a file, detached at the end.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Self {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(output.status.success(), "this test makes a loop device, as root: {output:?}");
        Self(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_block_device_is_an_image_too() {
    let folder = folder();
    let backing = folder.path().join("backing");
    fs::File::create(&backing).unwrap().set_len(8 << 20).unwrap();
    let device = Loop::over(&backing);
    let text = message(FileImage::open_target(&device.0));
    assert!(text.contains("block device") && text.contains("Name a folder"), "{text}");
    let options = FileOptions { state_dir: Some(folder.path().to_owned()) };
    let me = LeaseOwner::current().unwrap();
    let image = FileImage::open_target_with(&device.0, &options).unwrap();
    image.acquire_lease(&me).await.unwrap();
    assert_eq!(image.size().await.unwrap(), 8 << 20);
    assert!(!image.is_blank().await.unwrap(), "a device doesn't tell");
    assert!(image.remarks()[0].contains("not noticed"));
    assert_eq!(kind(image.resize(9 << 20).await), ErrorKind::NoSpace);
    image.write(0, noise(1, 2 << 20)).await.unwrap();
    image.write_zeroes(range(BLOCK, 3 * BLOCK)).await.unwrap();
    image.write_zeroes(range(10, 100)).await.unwrap();
    // A smaller image on a larger device; what stands behind it is no part of it, and zero if it becomes one.
    image.resize((1 << 20) + 5).await.unwrap();
    assert_eq!(image.size().await.unwrap(), (1 << 20) + 5);
    assert_eq!(kind(image.write(1 << 20, noise(1, 6)).await), ErrorKind::OutOfBounds);
    image.resize(3 << 20).await.unwrap();
    let mut expected = noise(1, 1 << 20).to_vec();
    expected.extend_from_slice(&noise(1, 2 << 20)[1 << 20..(1 << 20) + 5]);
    expected.resize(3 << 20, 0);
    expected[BLOCK as usize..4 * BLOCK as usize].fill(0);
    expected[10..110].fill(0);
    assert_eq!(read_all(&image).await, expected);
    let snapshot = image.create_snapshot("s").await.unwrap();
    assert_eq!(snapshot.size, 3 << 20);
    drop(image);

    let image = FileImage::open_target_with(&device.0, &options).unwrap();
    assert!(!image.head_differs(&snapshot).await.unwrap());
    image.acquire_lease(&me).await.unwrap();
    assert!(image.differing_blocks(0, &expected.clone().into()).await.unwrap().is_empty());
    let view = image.view(&Point::Snapshot(snapshot.clone())).await.unwrap();
    assert_eq!(view.diff(None, range(0, 8 << 20)).await.unwrap(), [Extent::data(range(0, 3 << 20))]);
    assert_eq!(view.read(range(0, 3 << 20)).await.unwrap(), expected);
    image.write(0, noise(3, 10)).await.unwrap();
    assert!(image.head_differs(&snapshot).await.unwrap());
    let source = FileImage::open_source(&device.0).unwrap();
    assert!(FileImage::same_file(&source, &image));
    assert_eq!(source.change_token().await.unwrap(), None);
    assert!(source.remarks()[0].contains("all of it is read"));
    let again = image.create_snapshot("t").await.unwrap();
    drop((image, source, view));
    let name = device.0.clone();
    drop(device);

    // Another disk under the same name isn't taken for the old one.
    let other = folder.path().join("other");
    fs::File::create(&other).unwrap().set_len(8 << 20).unwrap();
    let attached = Command::new("losetup").arg(&name).arg(&other).status().unwrap();
    let _device = Loop(name.clone());
    assert!(attached.success());
    let image = FileImage::open_target_with(&name, &options).unwrap();
    assert!(image.head_differs(&again).await.unwrap());
}
