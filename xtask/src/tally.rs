//! How many tests passed and failed, read from the lines that `cargo test` closes each suite with; and how many did not
//! run because the machine lacks something, read from the lines that they say so with.

/// Counts summed over suites.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
    /// Tests that ended well without having run: the harness counts them as passed.
    pub(crate) not_run: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.not_run += other.not_run;
    }

    /// Tests that ran and passed.
    pub(crate) fn truly_passed(&self) -> u64 {
        self.passed.saturating_sub(self.not_run)
    }

    /// Reads `test result: ok. 12 passed; 0 failed; 3 ignored; ...` and `NOT RUN a_test: why`; `None` for every other
    /// line.
    pub(crate) fn from_line(line: &str) -> Option<Tally> {
        if line.starts_with("NOT RUN ") && line.contains(": ") {
            return Some(Tally { not_run: 1, ..Tally::default() });
        }
        let counts = line.trim().strip_prefix("test result: ")?;
        let (_, counts) = counts.split_once(". ")?;
        let mut tally = Tally::default();
        for part in counts.split("; ") {
            let Some((count, word)) = part.split_once(' ') else { continue };
            let slot = match word {
                "passed" => &mut tally.passed,
                "failed" => &mut tally.failed,
                "ignored" => &mut tally.ignored,
                _ => continue,
            };
            *slot = count.parse().ok()?;
        }
        Some(tally)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_closing_line() {
        let ok = "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 1 filtered out; finished in 0.41s";
        assert_eq!(Tally::from_line(ok), Some(Tally { passed: 12, failed: 0, ignored: 3, not_run: 0 }));
        let bad = "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 9.00s\n";
        assert_eq!(Tally::from_line(bad), Some(Tally { passed: 2, failed: 1, ignored: 0, not_run: 0 }));
    }

    #[test]
    fn a_test_that_did_not_run_is_not_one_that_passed() {
        let mut tally = Tally::default();
        for line in ["NOT RUN nccl::real: no library\n", "test result: ok. 2 passed; 0 failed; 0 ignored"] {
            tally.add(Tally::from_line(line).unwrap());
        }
        assert_eq!((tally.passed, tally.not_run, tally.truly_passed()), (2, 1, 1));
    }

    #[test]
    fn other_lines_count_nothing() {
        for line in [
            "running 3 tests",
            "test result of nothing",
            "test a ... ok",
            "",
            "test result: ok",
            "test NOT RUN a: b",
            "NOT RUN",
        ] {
            assert_eq!(Tally::from_line(line), None, "{line:?}");
        }
    }
}
