//! The subcommands, one file each.

pub mod bench;
pub mod chat;
pub mod coordinator;
pub mod doctor;
pub mod kernels;
pub mod model;
pub mod serve;
pub mod verify;
pub mod worker;

use std::io::{IsTerminal, Write};
use std::sync::Arc;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use phalanx_model::Checkpoint;

use crate::local::{CellOptions, LocalCell};

/// Prints an error with its causes to standard error.
pub fn complain(error: &anyhow::Error) {
    // Nothing is left to do if standard error is gone.
    drop(writeln!(std::io::stderr(), "phalanx: {error:#}"));
}

/// Prints a line of news to standard error.
pub fn note(line: impl std::fmt::Display) {
    // Nobody needs to read it.
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// Whether what reads `out` shows colours.
#[must_use]
pub fn colours(out: &impl IsTerminal) -> bool {
    out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Bytes in MiB.
#[must_use]
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Prints a line to standard output.
///
/// # Errors
/// The reader is gone.
pub fn say(line: impl std::fmt::Display) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Prints a value as JSON to standard output.
///
/// # Errors
/// The reader is gone.
pub fn say_json(value: &serde_json::Value) -> Result<()> {
    say(value)
}

/// A bar over bytes on standard error; invisible where that is no terminal.
#[must_use]
pub fn byte_bar(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}")
        .expect("the template is well formed")
        .progress_chars("=> ");
    ProgressBar::new(0).with_style(style).with_message(what)
}

/// Sets a bar's position and length.
pub fn advance(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}

/// Starts a cell in this process with a bar over its loading.
///
/// # Errors
/// See [`LocalCell::start`].
pub fn start_cell(checkpoint: &Arc<Checkpoint>, options: &CellOptions) -> Result<LocalCell> {
    let bar = byte_bar("loading");
    let cell = LocalCell::start(checkpoint, options, |done, total| advance(&bar, done, total));
    bar.finish_and_clear();
    cell
}
