//! The closing table: a line for each suite, with its outcome and the reason.

use std::fmt;

/// What became of a suite; each with a short remark for the reader.
pub(crate) enum Outcome {
    Passed(String),
    Failed(String),
    /// It did not run: the remark says why, and what would make it run.
    NotRun(String),
}

/// The suites so far, in the order they ran.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<(String, Outcome)>,
}

impl Report {
    pub(crate) fn add(&mut self, suite: impl Into<String>, outcome: Outcome) {
        self.rows.push((suite.into(), outcome));
    }

    pub(crate) fn any_failed(&self) -> bool {
        self.rows.iter().any(|(_, outcome)| matches!(outcome, Outcome::Failed(_)))
    }

    pub(crate) fn any_not_run(&self) -> bool {
        self.rows.iter().any(|(_, outcome)| matches!(outcome, Outcome::NotRun(_)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|(suite, _)| suite.len()).max().unwrap_or(0);
        for (suite, outcome) in &self.rows {
            let (word, remark) = match outcome {
                Outcome::Passed(remark) => ("passed", remark),
                Outcome::Failed(remark) => ("FAILED", remark),
                Outcome::NotRun(remark) => ("NOT RUN", remark),
            };
            let line = format!("  {suite:<width$}  {word:<7}  {remark}");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_every_outcome_is_named() {
        let mut report = Report::default();
        report.add("fmt", Outcome::Passed(String::new()));
        report.add("clippy", Outcome::Failed("exit status: 101".into()));
        report.add("deny", Outcome::NotRun("not installed".into()));
        let lines = "  fmt     passed\n  clippy  FAILED   exit status: 101\n  deny    NOT RUN  not installed\n";
        assert_eq!(report.to_string(), lines);
        assert!(report.any_failed() && report.any_not_run());
    }
}
