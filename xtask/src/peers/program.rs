//! A program that is asked in lines and answers in lines of JSON, with a bound on every wait.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::json::Json;

/// Longer than the slowest answer: the full model, loaded and repacked on one core.
pub(crate) const WAIT: Duration = Duration::from_secs(1200);
/// Answers that may wait to be read.
const LINES: usize = 64;

/// Ends with the program: whoever drops it kills it.
pub(crate) struct Program {
    child: Child,
    lines: Receiver<String>,
    name: String,
    log: String,
}

impl Program {
    /// Starts it; what it writes to standard error goes to `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Program, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let error = |error: std::io::Error| format!("{}: {error}", log.display());
        let log_file = OpenOptions::new().create(true).append(true).open(log).map_err(error)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log_file);
        let mut child = command.spawn().map_err(|error| format!("cannot start {name}: {error}"))?;
        let (sender, lines) = sync_channel(LINES);
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Program { child, lines, name, log: log.display().to_string() })
    }

    /// The next line; `None` after the last.
    fn line(&self) -> Result<Option<String>, String> {
        match self.lines.recv_timeout(WAIT) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("{} says nothing for {} minutes: see {}", self.name, WAIT.as_secs() / 60, self.log))
            }
        }
    }

    /// The next line, as JSON.
    pub(crate) fn answer(&self) -> Result<Json, String> {
        let line = self.line()?.ok_or_else(|| format!("{} ended early: see {}", self.name, self.log))?;
        Json::parse(&line).map_err(|error| format!("{}: {error}", self.name))
    }

    /// Sends a line and waits for the answer.
    pub(crate) fn ask(&mut self, question: &str) -> Result<Json, String> {
        if let Some(stdin) = self.child.stdin.as_mut() {
            // A program that is gone is found out below, with where its last words are.
            let _ = writeln!(stdin, "{question}");
        }
        self.answer()
    }

    /// Closes its input and collects what it still says, until it ends well.
    pub(crate) fn finish(mut self) -> Result<Vec<String>, String> {
        drop(self.child.stdin.take());
        let mut lines = Vec::new();
        while let Some(line) = self.line()? {
            lines.push(line);
        }
        match self.child.wait() {
            Ok(status) if status.success() => Ok(lines),
            Ok(status) => Err(format!("{} ended with {status}: see {}", self.name, self.log)),
            Err(error) => Err(format!("{}: {error}", self.name)),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Another process that wants a whole core, until it is dropped.
pub(crate) struct BusyCore(Child);

impl BusyCore {
    pub(crate) fn start() -> Result<BusyCore, String> {
        let spin = Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn();
        spin.map(BusyCore).map_err(|error| format!("cannot start sh: {error}"))
    }
}

impl Drop for BusyCore {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        Program::start(Command::new("sh").args(["-c", script]), Path::new("/dev/null")).unwrap()
    }

    #[test]
    fn questions_are_answered_in_turn_and_the_rest_is_collected() {
        let mut program =
            shell("echo '{\"ready\":1}'; while read n; do echo \"{\\\"twice\\\":$((n * 2))}\"; done; echo end");
        assert_eq!(program.answer().unwrap().number("ready"), Ok(1.0));
        assert_eq!(program.ask("4").unwrap().number("twice"), Ok(8.0));
        assert_eq!(program.ask("5").unwrap().number("twice"), Ok(10.0));
        assert_eq!(program.finish().unwrap(), ["end"]);
    }

    #[test]
    fn a_program_that_dies_or_babbles_is_an_error_that_names_its_log() {
        let early = shell("exit 3").ask("hello").unwrap_err();
        assert!(early.contains("ended early") && early.contains("/dev/null"), "{early}");
        let status = shell("echo 1; exit 3").finish().unwrap_err();
        assert!(status.contains("exit status: 3"), "{status}");
        assert!(shell("echo not json").answer().is_err());
    }
}
