//! Panics as values, where a thread must tell of one.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a panic said. What it touched must not be used again.
pub(crate) type Panic = String;

/// Runs `body`; a panic in it becomes a value.
pub(crate) fn catch<T>(body: impl FnOnce() -> T) -> Result<T, Panic> {
    // Callers never use again what the body had in its hands.
    catch_unwind(AssertUnwindSafe(body)).map_err(|payload| message(&*payload))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}
