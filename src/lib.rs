//! The command line of Phalanx, and what joins coordinator and workers into one binary.
//!
//! - [`cli`]: what users may say.
//! - [`commands`]: one file for each subcommand.
//! - [`local`]: a cell whose ranks are threads of this process, for tools.
//! - [`children`]: workers as child processes.
//! - [`server`]: a coordinator with its HTTP face.
//! - [`client`]: what `chat` speaks to a server.

pub mod children;
pub mod cli;
pub mod client;
pub mod commands;
pub mod local;
pub mod server;
