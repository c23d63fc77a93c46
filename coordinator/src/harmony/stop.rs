//! Stop strings over text that arrives in pieces.

/// Finds the first stop string in a stream of text, across the borders of its pieces.
///
/// Text that may turn out to be the beginning of a stop string is held back, and no more than that. The stop string
/// itself and everything after it are never returned.
#[derive(Clone, Debug)]
pub struct StopScanner {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopScanner {
    /// A scanner for `stops`; empty strings among them are ignored, for they would stop everything.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece and returns the text that may be shown now.
    ///
    /// Where stop strings overlap, the one that is complete first ends the text, and of those that end together the
    /// longest. So the answer does not depend on how the text was cut into pieces.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        let seen = self.held.len();
        self.held.push_str(piece);
        if let Some(start) = self.first_stop(seen) {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let certain = self.held.len() - self.unfinished();
        let kept = self.held.split_off(certain);
        std::mem::replace(&mut self.held, kept)
    }

    /// Whether a stop string was found.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text held back, at the end of the stream: the stop string did not come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the stop string begins that is the first to be complete after the first `seen` bytes.
    fn first_stop(&self, seen: usize) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| {
            let from = floor_char(&self.held, (seen + 1).saturating_sub(stop.len()));
            let start = from + self.held[from..].find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }

    /// Bytes at the end of `held` that may be the beginning of a stop string.
    fn unfinished(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0).min(self.held.len());
        let starts = (self.held.len() - longest..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        let mut tails = starts.map(|at| &self.held[at..]);
        tails.find(|tail| self.stops.iter().any(|stop| stop.starts_with(tail))).map_or(0, str::len)
    }
}

/// The character border at or before `at`.
fn floor_char(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scanner(stops: &[&str]) -> StopScanner {
        StopScanner::new(&stops.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut scanner = scanner(stops);
        let mut texts: Vec<String> = pieces.iter().map(|piece| scanner.push(piece)).collect();
        texts.push(scanner.finish());
        (texts, scanner.stopped())
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_shown() {
        assert_eq!(shown(&["STOP"], &["one S", "TO", "P two", "x"]), (strings(&["one ", "", "", "", ""]), true));
    }

    #[test]
    fn what_was_only_a_beginning_is_shown_when_that_is_known() {
        assert_eq!(shown(&["STOP"], &["S", "TO", "RE", "ST"]), (strings(&["", "", "STORE", "", "ST"]), false));
    }

    #[test]
    fn nothing_is_held_back_without_need() {
        assert_eq!(shown(&["\n\n"], &["a\nb", "\n", "c"]), (strings(&["a\nb", "", "\nc", ""]), false));
        assert_eq!(shown(&[], &["a", "b"]), (strings(&["a", "b", ""]), false));
        assert_eq!(shown(&[""], &["a", "b"]), (strings(&["a", "b", ""]), false));
    }

    #[test]
    fn the_stop_string_that_is_complete_first_wins() {
        assert_eq!(shown(&["abcd", "bc"], &["xabcd"]), (strings(&["xa", ""]), true));
        assert_eq!(shown(&["bc", "abc"], &["xabcd"]), (strings(&["x", ""]), true));
    }

    #[test]
    fn a_stop_string_may_repeat_its_beginning() {
        assert_eq!(shown(&["aab"], &["a", "a", "a", "b"]), (strings(&["", "", "a", "", ""]), true));
        assert_eq!(shown(&["éé!"], &["é", "é", "é", "!"]), (strings(&["", "", "é", "", ""]), true));
    }

    proptest! {
        /// Against the definition: of all places where a stop string is complete, the first.
        #[test]
        fn pieces_do_not_matter(
            text in "[abé]{0,24}", stops in prop::collection::vec("[abé]{1,4}", 0..4), cuts in prop::collection::vec(0usize..4, 0..30)
        ) {
            let ends = (0..=text.len()).filter(|&end| text.is_char_boundary(end));
            let mut found = ends.filter_map(|end| {
                stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).map(|stop| end - stop.len()).min()
            });
            let stop = found.next();
            let expected = &text[..stop.unwrap_or(text.len())];

            let mut scanner = StopScanner::new(&stops);
            let mut chars = text.chars();
            let mut out = String::new();
            for cut in cuts {
                out += &scanner.push(&chars.by_ref().take(cut).collect::<String>());
            }
            out += &scanner.push(chars.as_str());
            out += &scanner.finish();
            prop_assert_eq!(out, expected);
            prop_assert_eq!(scanner.stopped(), stop.is_some());
        }
    }
}
