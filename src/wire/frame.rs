//! A frame's head: 16 bytes, the same in every version.

use super::{MAGIC, MESSAGE_MAX, PAYLOAD_MAX, VERSION_MAJOR, VERSION_MINOR, WireFault};

pub(super) const PREAMBLE_LENGTH: usize = 12;
pub(super) const HEAD_LENGTH: usize = 16;

/// Kinds of frames, as numbered in `proto/README.md`.
pub(super) mod kind {
    pub(in crate::wire) const HELLO: u16 = 1;
    pub(in crate::wire) const BATCH: u16 = 2;
    pub(in crate::wire) const END: u16 = 3;
    pub(in crate::wire) const FAILED: u16 = 4;
}

/// Flag: a reader that does not know the kind may skip the frame.
pub(super) const FLAG_SKIPPABLE: u16 = 1;

pub(super) fn preamble() -> [u8; PREAMBLE_LENGTH] {
    let mut bytes = [0; PREAMBLE_LENGTH];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION_MAJOR.to_le_bytes());
    bytes[10..].copy_from_slice(&VERSION_MINOR.to_le_bytes());
    bytes
}

pub(super) fn check_preamble(bytes: [u8; PREAMBLE_LENGTH]) -> Result<(), WireFault> {
    let [m0, m1, m2, m3, m4, m5, m6, m7, major_low, major_high, minor_low, minor_high] = bytes;
    let found = [m0, m1, m2, m3, m4, m5, m6, m7];
    let (major, minor) = (u16::from_le_bytes([major_low, major_high]), u16::from_le_bytes([minor_low, minor_high]));
    match (found == MAGIC, major == VERSION_MAJOR) {
        (false, _) => Err(WireFault::NotAStream { found }),
        (true, false) => Err(WireFault::Version { major, minor }),
        (true, true) => Ok(()),
    }
}

/// What stands before a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) message_length: u32,
    pub(super) payload_length: u32,
    /// Over the twelve bytes before it and the message.
    pub(super) crc32: u32,
}

impl Head {
    pub(super) fn new(kind: u16, message: &[u8], payload_length: u32) -> Self {
        let mut head = Self { kind, flags: 0, message_length: message.len() as u32, payload_length, crc32: 0 };
        head.crc32 = head.checksum(message);
        head
    }

    /// Reads a head, and refuses lengths beyond the limits before anybody allocates them.
    pub(super) fn decode(bytes: [u8; HEAD_LENGTH]) -> Result<Self, WireFault> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let head = Self {
            kind: u16_at(0),
            flags: u16_at(2),
            message_length: u32_at(4),
            payload_length: u32_at(8),
            crc32: u32_at(12),
        };
        if head.message_length > MESSAGE_MAX {
            return Err(WireFault::MessageTooLong { length: head.message_length });
        }
        if head.payload_length > PAYLOAD_MAX {
            return Err(WireFault::PayloadTooLong { length: head.payload_length });
        }
        Ok(head)
    }

    pub(super) fn encode(&self) -> [u8; HEAD_LENGTH] {
        let mut bytes = [0; HEAD_LENGTH];
        bytes[0..2].copy_from_slice(&self.kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.message_length.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload_length.to_le_bytes());
        bytes[12..].copy_from_slice(&self.crc32.to_le_bytes());
        bytes
    }

    pub(super) fn check(&self, message: &[u8]) -> Result<(), WireFault> {
        match self.checksum(message) {
            actual if actual == self.crc32 => Ok(()),
            actual => Err(WireFault::FrameChecksum { expected: self.crc32, actual }),
        }
    }

    fn checksum(&self, message: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.encode()[..HEAD_LENGTH - 4]);
        hasher.update(message);
        hasher.finalize()
    }
}
