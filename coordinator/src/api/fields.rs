//! JSON objects of a request, read field by field, so that every complaint names the field.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object and where in the request it stands. A field that is `null` counts as absent.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    /// The object `value` at `path`; the empty path is the request itself.
    pub(super) fn new(value: &'a Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value.as_object() {
            Some(map) => Ok(Self { map, path }),
            None if path.is_empty() => Err(ApiError::bad_body("the body must be a JSON object")),
            None => Err(wrong_type(&path, "an object", value)),
        }
    }

    /// The full name of a field.
    pub(super) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The field's value.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Fields there are.
    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    /// All fields.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    /// Whether the field stands there, even as `null`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// A field that is an object.
    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.get(key).map(|value| Fields::new(value, self.path(key))).transpose()
    }

    /// A field that is an array of at most `len_max`, each element with its full name.
    pub(super) fn array(&self, key: &str, len_max: usize) -> Result<Option<Vec<(String, &'a Value)>>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let path = self.path(key);
        let elements = value.as_array().ok_or_else(|| wrong_type(&path, "an array", value))?;
        if elements.len() > len_max {
            return Err(ApiError::invalid(path, format!("at most {len_max} elements are taken")));
        }
        Ok(Some(elements.iter().enumerate().map(|(at, element)| (format!("{path}[{at}]"), element)).collect()))
    }

    /// A field that is a string.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ApiError> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| self.wrong(key, "a string", value))).transpose()
    }

    /// A string that must be there.
    pub(super) fn required_text(&self, key: &str) -> Result<&'a str, ApiError> {
        self.text(key)?.ok_or_else(|| ApiError::missing(self.path(key)))
    }

    /// A field that is true or false.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ApiError> {
        self.get(key).map(|value| value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value))).transpose()
    }

    /// A field that is a whole number within `range`.
    pub(super) fn integer(&self, key: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        if !value.is_i64() && !value.is_u64() {
            return Err(self.wrong(key, "a whole number", value));
        }
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.out_of_range(key, &range)),
        }
    }

    /// A field that is a number within `range`.
    pub(super) fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| self.wrong(key, "a number", value))?;
        if range.contains(&number) { Ok(Some(number)) } else { Err(self.out_of_range(key, &range)) }
    }

    /// Complains that a field has the wrong type.
    pub(super) fn wrong(&self, key: &str, wanted: &str, found: &Value) -> ApiError {
        wrong_type(&self.path(key), wanted, found)
    }

    fn out_of_range<T: Display>(&self, key: &str, range: &RangeInclusive<T>) -> ApiError {
        let path = self.path(key);
        let message = format!("{path} must lie between {} and {}", range.start(), range.end());
        ApiError::invalid(path, message)
    }
}

/// Complains that the value at `path` has the wrong type.
pub(super) fn wrong_type(path: &str, wanted: &str, found: &Value) -> ApiError {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        // Which one: 5.0 is a number, but not one that counts.
        Value::Number(number) => &number.to_string(),
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::invalid(path, format!("{path} must be {wanted}, not {found}"))
}
