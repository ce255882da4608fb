//! Text that comes from other users and is shown to people, made harmless for the terminal that shows it.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Returns `true` if a character could change how a terminal shows the text around it: control characters (C0, DEL, C1), the
/// line and paragraph separators, the controls of bidirectional text, and every character without a width of its own that
/// Unicode lists as ignorable (DerivedCoreProperties, Default_Ignorable_Code_Point).
pub fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Returns `text` with `?` in the place of each harmful character.
pub fn sanitize(text: &str) -> Cow<'_, str> {
    match is_harmless(text) {
        true => text.into(),
        false => text.replace(is_harmful, "?").into(),
    }
}

/// Returns `true` if no character is harmful. Most texts are printable ASCII, which is quick to tell.
pub fn is_harmless(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~')) || !text.contains(is_harmful)
}

/// Returns a line of JSON with an escape (`\u202e`) in the place of each harmful character: a program reads the same strings,
/// and a terminal obeys none of them.
pub fn escape_json(line: &str) -> Cow<'_, str> {
    if is_harmless(line) {
        return line.into();
    }
    let mut escaped = String::with_capacity(line.len() + 16);
    for c in line.chars() {
        if is_harmful(c) {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            escaped.push(c);
        }
    }
    escaped.into()
}

/// A short text for a person: at most [`ShortText::BYTES_MAX`] bytes (a longer text is cut and ends in `…`), without harmful
/// characters (each becomes `?`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct ShortText(Box<str>);

impl ShortText {
    /// The longest text, in bytes.
    pub const BYTES_MAX: usize = 256;

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns `true` if the text is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<String> for ShortText {
    fn from(mut text: String) -> ShortText {
        const MORE: &str = "…";
        if !is_harmless(&text) {
            text = text.replace(is_harmful, "?");
        }
        if text.len() > ShortText::BYTES_MAX {
            text.truncate(text.floor_char_boundary(ShortText::BYTES_MAX - MORE.len()));
            text.push_str(MORE);
        }
        ShortText(text.into())
    }
}

impl From<&str> for ShortText {
    fn from(text: &str) -> ShortText {
        ShortText::from(text.to_string())
    }
}

impl From<ShortText> for String {
    fn from(text: ShortText) -> String {
        text.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARMFUL: [char; 14] = [
        '\0',
        '\n',
        '\x1b',
        '\x7f',
        '\u{85}',
        '\u{9b}',
        '\u{200b}',
        '\u{200f}',
        '\u{202e}',
        '\u{2066}',
        '\u{feff}',
        '\u{2028}',
        '\u{e0041}',
        '\u{3164}',
    ];

    #[test]
    fn no_harmful_character_is_shown() {
        for c in HARMFUL {
            assert_eq!(sanitize(&format!("a{c}b")), "a?b", "{c:?}");
            assert_eq!(ShortText::from(format!("a{c}b")).as_str(), "a?b", "{c:?}");
        }
        assert_eq!(sanitize("æ 漢字 👍 \u{5e9}"), "æ 漢字 👍 \u{5e9}", "letters of every script are shown");
    }

    #[test]
    fn a_program_reads_from_escaped_json_what_was_there() {
        for c in HARMFUL {
            let text = format!("a{c}b");
            let line = serde_json::to_string(&text).unwrap();
            let escaped = escape_json(&line);
            assert!(!escaped.contains(is_harmful), "{escaped:?}");
            assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), text);
        }
    }
}
