//! The head of a safetensors file: 8 bytes with the length of a JSON object, the object, then the numbers.
//!
//! Read as hostile. The numbers of all tensors together must fill the rest of the file, without a gap and
//! without an overlap, so that every byte of the file has one meaning.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// Bytes that say how long the header is.
const LENGTH_BYTES: usize = 8;
/// Longest header, as the safetensors library has it.
const HEADER_BYTES_MAX: usize = 100_000_000;
/// Most tensors of a file; the largest model has fewer than 20,000.
const TENSORS_MAX: usize = 1 << 16;
/// Most dimensions of a tensor.
const RANK_MAX: usize = 8;
/// Longest name of a tensor.
const NAME_BYTES_MAX: usize = 512;

/// Type of a tensor's numbers, by the format's own names.
#[allow(non_camel_case_types, reason = "the names stand in the files")]
#[allow(missing_docs, reason = "the names stand in the files")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum Dtype {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Bits of a number.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::F4 => 4,
            Self::F6_E2M3 | Self::F6_E3M2 => 6,
            Self::BOOL
            | Self::U8
            | Self::I8
            | Self::F8_E5M2
            | Self::F8_E4M3
            | Self::F8_E8M0
            | Self::F8_E4M3FNUZ
            | Self::F8_E5M2FNUZ => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where a tensor lies in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Type of its numbers.
    pub(crate) dtype: Dtype,
    /// Its dimensions, slowest first.
    pub(crate) shape: Vec<usize>,
    /// Its bytes, counted from the beginning of the file.
    pub(crate) range: Range<usize>,
}

/// What is wrong with the head of a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not even a length.
    #[error("the file has {bytes} bytes, too few for a safetensors header")]
    TooShort {
        /// Bytes of the file.
        bytes: usize,
    },
    /// The length cannot be right.
    #[error("the header is said to have {stated} bytes, but at most {most} are possible")]
    Length {
        /// Bytes said to be.
        stated: u64,
        /// Bytes there can be.
        most: usize,
    },
    /// Not text.
    #[error("the header is not UTF-8 at its byte {at}")]
    Utf8 {
        /// The first byte that is wrong.
        at: usize,
    },
    /// Not the object it should be.
    #[error("the header is not a table of tensors: {problem}")]
    Json {
        /// The parser's words.
        problem: String,
    },
    /// A shape that no tensor has.
    #[error("tensor `{tensor}` has shape {shape:?}, whose size overflows")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its dimensions.
        shape: Vec<usize>,
    },
    /// The place does not have the size that type and shape need.
    #[error("tensor `{tensor}` ({dtype} {shape:?}) needs {need} bytes, but data_offsets {begin}..{end} hold {}",
        end - begin)]
    Size {
        /// The tensor.
        tensor: String,
        /// Type of its numbers.
        dtype: Dtype,
        /// Its dimensions.
        shape: Vec<usize>,
        /// Bytes that these need.
        need: u64,
        /// First byte.
        begin: usize,
        /// Byte after the last.
        end: usize,
    },
    /// The end is before the beginning.
    #[error("tensor `{tensor}` has data_offsets {begin}..{end}, which run backwards")]
    Reversed {
        /// The tensor.
        tensor: String,
        /// First byte.
        begin: usize,
        /// Byte after the last.
        end: usize,
    },
    /// Two tensors share bytes.
    #[error("tensor `{tensor}` begins at {begin}, inside tensor `{before}`, which ends at {end}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// Its first byte.
        begin: usize,
        /// The tensor before it.
        before: String,
        /// Byte after that one's last.
        end: usize,
    },
    /// Bytes that belong to none.
    #[error("tensor `{tensor}` begins at {begin}, but the bytes before it end at {end}")]
    Gap {
        /// The tensor.
        tensor: String,
        /// Its first byte.
        begin: usize,
        /// Byte after the last of the tensor before it.
        end: usize,
    },
    /// The file was cut short.
    #[error("the file is cut short: tensor `{tensor}` ends at byte {end}, but the file has {bytes}")]
    Truncated {
        /// The first tensor that is not whole.
        tensor: String,
        /// Byte after its last, counted from the beginning of the file.
        end: usize,
        /// Bytes of the file.
        bytes: usize,
    },
    /// More than the tensors.
    #[error("the tensors end at byte {end}, but the file has {bytes}")]
    Trailing {
        /// Byte after the last tensor's last.
        end: usize,
        /// Bytes of the file.
        bytes: usize,
    },
}

/// A JSON object whose keys differ from each other and are bounded in number and size.
pub(super) struct UniqueMap<V>(pub(super) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = access.next_key::<String>()? {
            if key == "__metadata__" {
                access.next_value::<IgnoredAny>()?;
                continue;
            }
            if key.len() > NAME_BYTES_MAX {
                return Err(A::Error::custom(format_args!(
                    "a name of {} bytes, at most {NAME_BYTES_MAX} are possible",
                    key.len()
                )));
            }
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!("tensor `{key}` appears twice")));
            }
            if map.len() == TENSORS_MAX {
                return Err(A::Error::custom(format_args!("more than {TENSORS_MAX} tensors")));
            }
            let value =
                access.next_value().map_err(|error| A::Error::custom(format_args!("tensor `{key}`: {error}")))?;
            map.insert(key, value);
        }
        Ok(UniqueMap(map))
    }
}

/// A tensor as the header states it.
#[derive(Deserialize)]
struct Stated {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (usize, usize),
}

/// At most [`RANK_MAX`] dimensions.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {RANK_MAX} dimensions")
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut access: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = access.next_element()? {
                    if shape.len() == RANK_MAX {
                        return Err(A::Error::invalid_length(RANK_MAX + 1, &self));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// The tensors of a file, given all its bytes; of these only the header is read.
pub(crate) fn parse(file: &[u8]) -> Result<BTreeMap<String, Entry>, HeaderError> {
    let bytes = file.len();
    let (length, rest) = file.split_first_chunk::<LENGTH_BYTES>().ok_or(HeaderError::TooShort { bytes })?;
    let stated = u64::from_le_bytes(*length);
    let most = rest.len().min(HEADER_BYTES_MAX);
    let header = usize::try_from(stated).ok().filter(|&n| n <= most).and_then(|n| rest.get(..n));
    let header = header.ok_or(HeaderError::Length { stated, most })?;
    let text = std::str::from_utf8(header).map_err(|error| HeaderError::Utf8 { at: error.valid_up_to() })?;
    let UniqueMap::<Stated>(stated) =
        serde_json::from_str(text).map_err(|error| HeaderError::Json { problem: error.to_string() })?;

    for (name, Stated { dtype, shape: Shape(shape), data_offsets: (begin, end) }) in &stated {
        let (tensor, begin, end) = (name.clone(), *begin, *end);
        if begin > end {
            return Err(HeaderError::Reversed { tensor, begin, end });
        }
        let bits = shape.iter().try_fold(u64::from(dtype.bits()), |n, &dimension| n.checked_mul(dimension as u64));
        let Some(bits) = bits else { return Err(HeaderError::Overflow { tensor, shape: shape.clone() }) };
        if !bits.is_multiple_of(8) || bits / 8 != (end - begin) as u64 {
            let (shape, need) = (shape.clone(), bits.div_ceil(8));
            return Err(HeaderError::Size { tensor, dtype: *dtype, shape, need, begin, end });
        }
    }

    let mut in_order: Vec<(&String, (usize, usize))> = stated.iter().map(|(n, s)| (n, s.data_offsets)).collect();
    in_order.sort_by_key(|&(_, offsets)| offsets);
    let data = LENGTH_BYTES + header.len();
    let mut before: (&str, usize) = ("", 0);
    for (name, (begin, end)) in in_order {
        let tensor = name.clone();
        if begin < before.1 {
            return Err(HeaderError::Overlap { tensor, begin, before: before.0.to_owned(), end: before.1 });
        }
        if begin > before.1 {
            return Err(HeaderError::Gap { tensor, begin, end: before.1 });
        }
        if end > bytes - data {
            return Err(HeaderError::Truncated { tensor, end: end.saturating_add(data), bytes });
        }
        before = (name, end);
    }
    if data + before.1 != bytes {
        return Err(HeaderError::Trailing { end: data + before.1, bytes });
    }
    let entry =
        |s: Stated| Entry { dtype: s.dtype, shape: s.shape.0, range: data + s.data_offsets.0..data + s.data_offsets.1 };
    Ok(stated.into_iter().map(|(name, stated)| (name, entry(stated))).collect())
}

/// The head of a file that holds these tensors one after the other, padded to 8 bytes. `format` is the name of the
/// framework whose layout the numbers have; files may leave it out.
pub(crate) fn text<'a>(format: Option<&str>, tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    if let Some(format) = format {
        object.insert("__metadata__".to_owned(), serde_json::json!({"format": format}));
    }
    let mut begin = 0;
    for (name, dtype, shape) in tensors {
        let end = begin + shape.iter().map(|&n| n as u64).product::<u64>() * u64::from(dtype.bits()) / 8;
        let stated = serde_json::json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [begin, end]});
        object.insert(name.to_owned(), stated);
        begin = end;
    }
    let mut header = serde_json::Value::Object(object).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    [&(header.len() as u64).to_le_bytes(), header.as_slice()].concat()
}
