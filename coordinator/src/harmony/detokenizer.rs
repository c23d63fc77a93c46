//! Bytes that arrive in pieces, as text.

use std::str::from_utf8;

/// Turns a stream of bytes into text: a character whose bytes are still to come is held back, bytes that can no
/// longer become a character are replaced by U+FFFD.
///
/// Whatever the pieces, the text in total is that of [`String::from_utf8_lossy`] over all bytes.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// The beginning of a character: at most 3 bytes between calls.
    held: Vec<u8>,
}

impl Detokenizer {
    /// Takes the next bytes and returns the text that is certain now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.held.as_slice();
        loop {
            match from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(len) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[len..];
                }
            }
        }
        self.held = rest.to_vec();
        text
    }

    /// The text of what was held back, at the end of the stream. The detokenizer is as new afterwards.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn in_pieces(bytes: &[u8], len: usize) -> Vec<String> {
        let mut detokenizer = Detokenizer::default();
        let mut texts: Vec<String> = bytes.chunks(len).map(|piece| detokenizer.push(piece)).collect();
        texts.push(detokenizer.finish());
        texts
    }

    #[test]
    fn a_character_appears_with_its_last_byte() {
        assert_eq!(in_pieces("é🦀".as_bytes(), 1), ["", "é", "", "", "", "🦀", ""]);
    }

    #[test]
    fn bytes_that_cannot_become_a_character_are_replaced_at_once() {
        assert_eq!(in_pieces(b"\xf0\x9f!", 1), ["", "", "\u{fffd}!", ""]);
        assert_eq!(in_pieces(b"\xff", 1), ["\u{fffd}", ""]);
    }

    #[test]
    fn an_unfinished_character_is_replaced_at_the_end() {
        assert_eq!(in_pieces(b"a\xf0\x9f\xa6", 9), ["a", "\u{fffd}"]);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(bytes: Vec<u8>, len in 1usize..9) {
            prop_assert_eq!(in_pieces(&bytes, len).concat(), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn text_survives(text in "\\PC{0,40}", len in 1usize..5) {
            prop_assert_eq!(in_pieces(text.as_bytes(), len).concat(), text);
        }
    }
}
