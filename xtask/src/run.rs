//! Running other programs: each is shown before it runs, and its output streams through.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitStatus, Stdio};

use crate::House;
use crate::report::Outcome;
use crate::tally::Tally;

/// The cargo that runs this task, working in the repository's root.
pub(crate) fn cargo<I: IntoIterator<Item = A>, A: AsRef<OsStr>>(house: &House, arguments: I) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&house.root).args(arguments);
    command
}

/// Prints the command line, with the environment it adds.
fn show(command: &Command) {
    let mut words: Vec<String> = Vec::new();
    for (name, value) in command.get_envs() {
        let value = value.unwrap_or_default().to_string_lossy();
        let value = if value.contains(' ') { format!("'{value}'") } else { value.into_owned() };
        words.push(format!("{}={value}", name.to_string_lossy()));
    }
    words.push(command.get_program().to_string_lossy().into_owned());
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    println!("\n$ {}", words.join(" "));
}

/// Runs a command with its output as it is.
pub(crate) fn run(command: &mut Command) -> Outcome {
    show(command);
    match command.status() {
        Ok(status) => outcome(status),
        Err(error) => Outcome::Failed(format!("cannot start: {error}")),
    }
}

/// Runs a `cargo test`, passes its standard output on line by line and sums the closing lines.
pub(crate) fn run_tests(command: &mut Command) -> (Outcome, Tally) {
    run_tests_into(&mut std::io::stdout(), command)
}

fn run_tests_into(output: &mut impl Write, command: &mut Command) -> (Outcome, Tally) {
    show(command);
    let mut tally = Tally::default();
    let outcome = match stream(output, command, &mut tally) {
        Ok(status) => outcome(status),
        Err(error) => Outcome::Failed(format!("cannot run: {error}")),
    };
    // A suite that does not build, or dies, has no closing line of its own: it still counts as a failure.
    if matches!(outcome, Outcome::Failed(_)) && tally.failed == 0 {
        tally.failed = 1;
    }
    (outcome, tally)
}

fn stream(output: &mut impl Write, command: &mut Command, tally: &mut Tally) -> std::io::Result<ExitStatus> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            output.write_all(&line)?;
            if let Some(counted) = Tally::from_line(&String::from_utf8_lossy(&line)) {
                tally.add(counted);
            }
            line.clear();
        }
    }
    child.wait()
}

/// Runs a command for its exit status alone; a program that is not there counts as a refusal.
pub(crate) fn answers(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn outcome(status: ExitStatus) -> Outcome {
    if status.success() { Outcome::Passed(String::new()) } else { Outcome::Failed(status.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_summed_whatever_else_is_printed() {
        let print = "printf '\\377\\ntest result: ok. 2 passed; 0 failed\\ntest result: ok. 3 passed; 0 failed\\n'";
        let mut output = Vec::new();
        let (outcome, tally) = run_tests_into(&mut output, Command::new("sh").args(["-c", print]));
        assert!(matches!(outcome, Outcome::Passed(_)));
        assert!(output.starts_with(b"\xff\n") && output.ends_with(b"3 passed; 0 failed\n"), "passed on unchanged");
        assert_eq!(tally, Tally { passed: 5, failed: 0, ignored: 0, not_run: 0 });
    }

    #[test]
    fn a_suite_that_dies_without_a_closing_line_is_a_failure() {
        let (outcome, tally) = run_tests_into(&mut Vec::new(), Command::new("sh").args(["-c", "exit 101"]));
        assert!(matches!(outcome, Outcome::Failed(_)));
        assert_eq!(tally.failed, 1);
    }
}
