//! How many tests passed and failed, read from the lines that `cargo test` closes each suite with.

/// Counts summed over suites.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// Reads `test result: ok. 12 passed; 0 failed; 3 ignored; ...`; `None` for every other line.
    pub(crate) fn from_line(line: &str) -> Option<Tally> {
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
        assert_eq!(Tally::from_line(ok), Some(Tally { passed: 12, failed: 0, ignored: 3 }));
        let bad = "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 9.00s\n";
        assert_eq!(Tally::from_line(bad), Some(Tally { passed: 2, failed: 1, ignored: 0 }));
    }

    #[test]
    fn other_lines_count_nothing() {
        for line in ["running 3 tests", "test result of nothing", "test a ... ok", "", "test result: ok"] {
            assert_eq!(Tally::from_line(line), None, "{line:?}");
        }
    }
}
