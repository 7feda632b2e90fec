use proptest::prelude::*;

use super::*;

const SIZE_MAX: u64 = 5 * BLOCK;

#[derive(Clone, Debug)]
enum Step {
    Write {
        at: u64,
        length: u64,
        seed: u64,
    },
    Zero {
        at: u64,
        length: u64,
    },
    Resize(u64),
    /// Compare with the content, changed at some places.
    Compare {
        first: u64,
        count: u64,
        changed: Vec<u64>,
    },
    /// Commit and go on in a new process.
    Commit,
    /// Go on in a new process without.
    Crash,
    /// Commit; then somebody else writes.
    Foreign {
        at: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let at = || prop_oneof![0..SIZE_MAX, (0..5u64).prop_map(|block| block * BLOCK)];
    let length = || prop_oneof![1..SIZE_MAX, (1..4u64).prop_map(|blocks| blocks * BLOCK), 1..5000u64];
    prop_oneof![
        4 => (at(), length(), 1..4u64).prop_map(|(at, length, seed)| Step::Write { at, length, seed }),
        2 => (at(), length()).prop_map(|(at, length)| Step::Zero { at, length }),
        1 => prop_oneof![0..SIZE_MAX, (0..5u64).prop_map(|blocks| blocks * BLOCK)].prop_map(Step::Resize),
        4 => (0..5u64, 1..6u64, prop::collection::vec(at(), 0..3))
            .prop_map(|(first, count, changed)| Step::Compare { first, count, changed }),
        1 => Just(Step::Commit),
        1 => Just(Step::Crash),
        1 => at().prop_map(|at| Step::Foreign { at }),
    ]
}

/// The image and what it should hold, as plainly as it can be said.
struct Model {
    path: PathBuf,
    image: FileImage,
    bytes: Vec<u8>,
    commits: u64,
}

impl Model {
    fn clip(&self, at: u64, length: u64) -> Option<ByteRange> {
        range(at, length).clip(self.bytes.len() as u64)
    }

    fn part(&mut self, range: ByteRange) -> &mut [u8] {
        &mut self.bytes[range.offset() as usize..range.end() as usize]
    }

    async fn commit(&mut self) -> Snapshot {
        self.commits += 1;
        let snapshot = self.image.create_snapshot(&format!("s{}", self.commits)).await.unwrap();
        assert!(!self.image.head_differs(&snapshot).await.unwrap());
        snapshot
    }

    async fn reopen(&mut self) {
        self.image.release_lease().await.unwrap();
        self.image = leased(&self.path).await;
    }

    async fn run(&mut self, step: Step) {
        match step {
            Step::Write { at, length, seed } => {
                let Some(range) = self.clip(at, length) else { return };
                // The same bytes come again, so that blocks change back to what they were.
                let whole = noise(seed, SIZE_MAX as usize);
                let data = whole.slice(range.offset() as usize..range.end() as usize);
                self.part(range).copy_from_slice(&data);
                self.image.write(range.offset(), data).await.unwrap();
            }
            Step::Zero { at, length } => {
                let Some(range) = self.clip(at, length) else { return };
                self.part(range).fill(0);
                self.image.write_zeroes(range).await.unwrap();
            }
            Step::Resize(size) => {
                self.bytes.resize(size as usize, 0);
                self.image.resize(size).await.unwrap();
            }
            Step::Compare { first, count, changed } => self.compare(first, count, &changed).await,
            Step::Commit => {
                self.commit().await;
                self.reopen().await;
            }
            Step::Crash => self.reopen().await,
            Step::Foreign { at } => {
                let snapshot = self.commit().await;
                self.image.release_lease().await.unwrap();
                if let Some(range) = self.clip(at, 3) {
                    let file = fs::File::options().write(true).open(&self.path).unwrap();
                    self.part(range).iter_mut().for_each(|byte| *byte ^= 0x55);
                    file.write_all_at(&self.bytes[range.offset() as usize..range.end() as usize], at).unwrap();
                    assert!(self.image.head_differs(&snapshot).await.unwrap());
                }
                self.image = leased(&self.path).await;
            }
        }
    }

    async fn compare(&mut self, first: u64, count: u64, changed: &[u64]) {
        let Some(range) = self.clip(first * BLOCK, count * BLOCK) else { return };
        let mut other = self.part(range).to_vec();
        for at in changed.iter().filter(|at| **at < range.length()) {
            other[*at as usize] ^= 0xaa;
        }
        let there = self.part(range).to_vec();
        let mut expected = Vec::new();
        for block in range.split_at_multiples(BLOCK) {
            let (from, to) = ((block.offset() - range.offset()) as usize, (block.end() - range.offset()) as usize);
            if there[from..to] != other[from..to] {
                expected.push(block);
            }
        }
        let found = self.image.differing_blocks(range.offset(), &other.into()).await.unwrap();
        assert_eq!(found, crate::extent::normalize(expected));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn digests_and_content_always_agree(
        size in 1..SIZE_MAX,
        steps in prop::collection::vec(step(), 1..30),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let folder = folder();
            let path = disk(&folder);
            let image = created(&path, size).await;
            let mut model = Model { path, image, bytes: vec![0; size as usize], commits: 0 };
            for step in steps {
                model.run(step).await;
                assert_eq!(model.image.size().await.unwrap(), model.bytes.len() as u64);
            }
            model.compare(0, 5, &[]).await;
            assert_eq!(fs::read(&model.path).unwrap(), model.bytes);
        });
    }
}
