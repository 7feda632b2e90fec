//! Reads a diff stream.

use tokio::io::AsyncRead;

use super::{
    BANNER_V1, BANNER_V2, DiffError, DiffFault, DiffHeader, DiffVersion, Input, NAME_MAX, PIECE_MAX, Record, tag,
};
use crate::extent::ByteRange;

/// Reads a diff stream of either version, a record or a piece of one at a time, and trusts none of it.
///
/// Records may come in any order, as rbd writes them for striped images, but lie within the size. A call that was
/// cancelled, or failed, leaves the stream unreadable.
pub struct DiffReader<R> {
    input: Input<R>,
    header: DiffHeader,
    /// The rest of a record of data.
    pending: Option<ByteRange>,
    record_offset: u64,
    open: bool,
}

impl<R: AsyncRead + Unpin> DiffReader<R> {
    /// Reads everything up to the image's size. Buffers on its own.
    pub async fn open(input: R) -> Result<Self, DiffError> {
        Self::resume(Input::new(input)).await
    }

    /// Reads a diff that begins where `input` is.
    pub(crate) async fn resume(mut input: Input<R>) -> Result<Self, DiffError> {
        let mut record_offset = input.offset();
        match read_header(&mut input, &mut record_offset).await {
            Ok(header) => Ok(Self { input, header, pending: None, record_offset, open: true }),
            Err(fault) => Err(DiffError { offset: record_offset, fault }),
        }
    }

    /// What the diff says before its data.
    pub fn header(&self) -> &DiffHeader {
        &self.header
    }

    /// How many bytes were read.
    pub fn bytes_read(&self) -> u64 {
        self.input.offset()
    }

    /// Reads the next record, a piece of one, or the end. After the end nothing is read: not even whether the input
    /// ends there, which is [`Self::expect_nothing_more`]'s.
    pub async fn next(&mut self) -> Result<Record, DiffError> {
        // Stays false when this future is dropped or fails.
        let result = match std::mem::replace(&mut self.open, false) {
            true => self.read_record().await,
            false => Err(DiffFault::Finished),
        };
        self.open = matches!(result, Ok(Record::Data { .. } | Record::Zero(_)));
        result.map_err(|fault| DiffError { offset: self.record_offset, fault })
    }

    /// Waits for the end of the input, and refuses anything before it: for files, and for pipes that are closed by
    /// their writer.
    pub async fn expect_nothing_more(&mut self) -> Result<(), DiffError> {
        let offset = self.input.offset();
        let fault = match self.input.at_end().await {
            Ok(true) => return Ok(()),
            Ok(false) => DiffFault::TrailingBytes,
            Err(fault) => fault,
        };
        Err(DiffError { offset, fault })
    }

    /// An error about the record that was read last.
    pub(super) fn fault(&self, fault: DiffFault) -> DiffError {
        DiffError { offset: self.record_offset, fault }
    }

    /// The input, for what follows the end.
    pub(crate) fn into_input(self) -> Input<R> {
        self.input
    }

    async fn read_record(&mut self) -> Result<Record, DiffFault> {
        if let Some(rest) = self.pending.take() {
            return self.read_piece(rest).await;
        }
        loop {
            self.record_offset = self.input.offset();
            match self.input.u8("a record, before the end that was to come").await? {
                tag::END => return Ok(Record::End),
                tag::DATA => {
                    let range = self.read_range(tag::DATA).await?;
                    return self.read_piece(range).await;
                }
                tag::ZERO => return self.read_range(tag::ZERO).await.map(Record::Zero),
                tag if known_in_header(self.header.version, tag) => {
                    return Err(DiffFault::OutOfOrder { tag: tag.into(), expected: "data or the end" });
                }
                tag => skip_unknown(&mut self.input, self.header.version, tag).await?,
            }
        }
    }

    async fn read_range(&mut self, tag: u8) -> Result<ByteRange, DiffFault> {
        let DiffHeader { version, size, .. } = self.header;
        let record_length = match version {
            DiffVersion::V1 => None,
            DiffVersion::V2 => Some(self.input.u64("a record's length").await?),
        };
        let (offset, length) = (self.input.u64("a record").await?, self.input.u64("a record").await?);
        let range = ByteRange::new(offset, length).map_err(|source| DiffFault::Range { tag: tag.into(), source })?;
        if range.end() > size {
            return Err(DiffFault::BeyondImage { tag: tag.into(), range, size });
        }
        let expected = if tag == tag::DATA { length.saturating_add(16) } else { 16 };
        match record_length {
            Some(length) if length != expected => Err(DiffFault::RecordLength { tag: tag.into(), length, expected }),
            _ => Ok(range),
        }
    }

    /// Reads the part of `rest` up to the next multiple of [`PIECE_MAX`].
    async fn read_piece(&mut self, rest: ByteRange) -> Result<Record, DiffFault> {
        let piece = rest.split_at_multiples(PIECE_MAX).next().unwrap_or(rest);
        let bytes = self.input.piece(piece.length() as usize).await?;
        self.pending = ByteRange::between(piece.end(), rest.end());
        Ok(Record::Data { offset: piece.offset(), bytes })
    }
}

fn known_in_header(version: DiffVersion, tag: u8) -> bool {
    matches!(tag, tag::FROM | tag::TO | tag::SIZE) || (tag == tag::PROTECTED && version == DiffVersion::V2)
}

async fn read_header<R: AsyncRead + Unpin>(
    input: &mut Input<R>,
    record_offset: &mut u64,
) -> Result<DiffHeader, DiffFault> {
    let version = match &input.array("the banner").await? {
        BANNER_V1 => DiffVersion::V1,
        BANNER_V2 => DiffVersion::V2,
        other => return Err(DiffFault::NotADiff { found: String::from_utf8_lossy(other).into_owned() }),
    };
    let mut header = DiffHeader { version, from: None, to: None, protected: None, size: 0 };
    // The tags in the order in which they must come, of which each comes once.
    let mut rest: &[u8] = &[tag::FROM, tag::TO, tag::PROTECTED, tag::SIZE];
    loop {
        *record_offset = input.offset();
        let tag = input.u8("the header").await?;
        if !known_in_header(version, tag) {
            if matches!(tag, tag::DATA | tag::ZERO | tag::END) {
                return Err(DiffFault::OutOfOrder { tag: tag.into(), expected: "the image's size" });
            }
            skip_unknown(input, version, tag).await?;
            continue;
        }
        match rest.iter().position(|&next| next == tag) {
            Some(at) => rest = &rest[at + 1..],
            None => return Err(DiffFault::OutOfOrder { tag: tag.into(), expected: "a later part of the header" }),
        }
        let record_length = match version {
            DiffVersion::V1 => None,
            DiffVersion::V2 => Some(input.u64("the header").await?),
        };
        match tag {
            tag::FROM => header.from = Some(read_name(input, tag, record_length).await?),
            tag::TO => header.to = Some(read_name(input, tag, record_length).await?),
            // rbd 16.2 writes a length of 8 before this one byte, and reads one byte whatever the length is.
            tag::PROTECTED => header.protected = Some(input.u8("the header").await? != 0),
            _ => {
                check_record_length(tag, record_length, 8)?;
                header.size = input.u64("the header").await?;
                return Ok(header);
            }
        }
    }
}

async fn read_name<R: AsyncRead + Unpin>(
    input: &mut Input<R>,
    tag: u8,
    record_length: Option<u64>,
) -> Result<String, DiffFault> {
    let length = input.u32("a snapshot's name").await?;
    if length == 0 || length as usize > NAME_MAX {
        return Err(DiffFault::NameLength { length: length.into() });
    }
    check_record_length(tag, record_length, 4 + u64::from(length))?;
    let mut name = vec![0; length as usize];
    input.fill(&mut name, "a snapshot's name").await?;
    String::from_utf8(name).map_err(|_| DiffFault::NameNotText)
}

fn check_record_length(tag: u8, length: Option<u64>, expected: u64) -> Result<(), DiffFault> {
    match length {
        Some(length) if length != expected => Err(DiffFault::RecordLength { tag: tag.into(), length, expected }),
        _ => Ok(()),
    }
}

async fn skip_unknown<R: AsyncRead + Unpin>(
    input: &mut Input<R>,
    version: DiffVersion,
    tag: u8,
) -> Result<(), DiffFault> {
    match version {
        DiffVersion::V1 => Err(DiffFault::UnknownTag { tag }),
        DiffVersion::V2 => {
            let length = input.u64("a record's length").await?;
            input.skip(length).await
        }
    }
}
