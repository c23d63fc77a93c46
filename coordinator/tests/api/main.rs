//! The HTTP face as clients see it: a real server on a real socket, over an engine that plays scripted harmony tokens.
#![allow(clippy::unwrap_used, reason = "tests")]

mod answers;
mod bad_input;
mod connections;
mod failures;
mod health;
mod keys;
mod prompts;
mod sampling;
mod streams;
mod support;
