//! Why bytes are not the message they should be.

use std::fmt::Display;

use prost::UnknownEnumValue;

/// Why a message is refused. Names the field, so that the sender can be mended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is absent.
    #[error("field `{field}` is missing; coordinator and workers must run the same build")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A value that means nothing here.
    #[error("field `{field}` has the unknown value {value}; coordinator and workers must run the same build")]
    Unknown {
        /// The field.
        field: &'static str,
        /// The value.
        value: i32,
    },
    /// More entries or a larger number than anything legitimate has.
    #[error("field `{field}` is {value}, at most {max} is accepted")]
    TooLarge {
        /// The field.
        field: &'static str,
        /// Its value, or how many entries it has.
        value: u64,
        /// How much is accepted.
        max: u64,
    },
    /// A value that cannot be.
    #[error("field `{field}` {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Bytes were damaged on the way.
    #[error("checksum of an envelope is {computed:08x}, it states {stated:08x}; the message was damaged on its way")]
    Checksum {
        /// What the envelope states.
        stated: u32,
        /// What its payload gives.
        computed: u32,
    },
    /// Bytes that are no message of this kind.
    #[error("not a message of this kind: {0}")]
    Malformed(#[from] prost::DecodeError),
}

impl WireError {
    pub(crate) fn invalid(field: &'static str, problem: impl Display) -> Self {
        Self::Invalid { field, problem: problem.to_string() }
    }
}

/// The value of a field that must be there.
pub(crate) fn present<T>(field: &'static str, value: Option<T>) -> Result<T, WireError> {
    value.ok_or(WireError::Missing { field })
}

/// The value of an enumeration.
pub(crate) fn known<E: TryFrom<i32, Error = UnknownEnumValue>>(
    field: &'static str,
    value: i32,
) -> Result<E, WireError> {
    E::try_from(value).map_err(|_| WireError::Unknown { field, value })
}

/// A number of at most `max`.
pub(crate) fn at_most<T: Copy + Into<u64>>(field: &'static str, value: T, max: T) -> Result<T, WireError> {
    let (v, m) = (value.into(), max.into());
    if v > m { Err(WireError::TooLarge { field, value: v, max: m }) } else { Ok(value) }
}

/// A number from 1 to `max`.
pub(crate) fn counted(field: &'static str, value: u32, max: u32) -> Result<u32, WireError> {
    if value == 0 { Err(WireError::invalid(field, "is 0")) } else { at_most(field, value, max) }
}

/// A list of at most `max` entries.
pub(crate) fn short<T>(field: &'static str, list: Vec<T>, max: usize) -> Result<Vec<T>, WireError> {
    at_most(field, list.len() as u64, max as u64)?;
    Ok(list)
}

/// A text of at most `max` bytes.
pub(crate) fn brief(field: &'static str, text: String, max: usize) -> Result<String, WireError> {
    at_most(field, text.len() as u64, max as u64)?;
    Ok(text)
}

/// Every entry of a list made into what it means.
pub(crate) fn all<W, T: TryFrom<W, Error = WireError>>(list: Vec<W>) -> Result<Vec<T>, WireError> {
    list.into_iter().map(T::try_from).collect()
}
