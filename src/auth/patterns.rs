//! Which keys a name may lock.

use wildmatch::WildMatch;

use crate::proto::{Key, LockId};

/// Grants a name the right to break locks of other names.
const ADMIN: &str = "!admin";

/// The patterns of one name. Without any, the name may lock every key.
#[derive(Clone, Debug, Default)]
pub(super) struct Patterns {
    patterns: Vec<Pattern>,
    is_admin: bool,
}

#[derive(Clone, Debug)]
struct Pattern {
    text: WildMatch,
    /// The lock of a pattern without wildcards, for clients that name a lock by its identity.
    lock: Option<LockId>,
}

impl Patterns {
    /// # Errors
    /// Why one of the words is not a pattern.
    pub(super) fn parse<'a>(words: impl Iterator<Item = &'a str>) -> Result<Patterns, String> {
        let mut patterns = Patterns::default();
        for word in words {
            match word {
                ADMIN => patterns.is_admin = true,
                _ if word.starts_with('!') => {
                    return Err(format!("{word:?}: the only pattern that begins with ! is {ADMIN}"));
                }
                _ => patterns.patterns.push(Pattern::new(word)),
            }
        }
        Ok(patterns)
    }

    pub(super) fn is_admin(&self) -> bool {
        self.is_admin
    }

    pub(super) fn admit(&self, key: &Key) -> bool {
        self.patterns.is_empty() || self.patterns.iter().any(|pattern| pattern.text.matches(key.as_str()))
    }

    /// Returns `true` if the key of this lock matches, as far as that can be told without the key: only if every key matches, or
    /// a pattern is the key itself.
    pub(super) fn admit_lock(&self, lock: LockId) -> bool {
        let admits = |pattern: &Pattern| pattern.text.pattern() == "*" || pattern.lock == Some(lock);
        self.patterns.is_empty() || self.patterns.iter().any(admits)
    }
}

impl Pattern {
    fn new(text: &str) -> Pattern {
        let is_literal = !text.contains(['*', '?']);
        let key = is_literal.then(|| Key::new(text).ok()).flatten();
        Pattern { text: WildMatch::new(text), lock: key.map(|key| key.id()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(text: &str) -> Patterns {
        Patterns::parse(text.split_ascii_whitespace()).unwrap()
    }

    fn admits(text: &str, key: &str) -> bool {
        patterns(text).admit(&Key::new(key).unwrap())
    }

    #[test]
    fn a_key_must_match_one_of_the_patterns_as_a_whole() {
        assert!(admits("deploy/*", "deploy/web"));
        assert!(admits("deploy/*", "deploy/web/eu"));
        assert!(admits("build test?", "test1"));
        for key in ["deploy", "xdeploy/web", "build2", "test", "test12", "Build"] {
            assert!(!admits("deploy/* build test?", key), "{key}");
        }
    }

    #[test]
    fn without_patterns_every_key_matches() {
        assert!(admits("", "anything"));
        assert!(admits("!admin", "anything"));
        assert!(!admits("!admin deploy/*", "anything"));
        assert!(patterns("!admin deploy/*").is_admin());
        assert!(!patterns("deploy/*").is_admin());
    }

    #[test]
    fn a_lock_without_its_key_matches_only_what_is_certain() {
        let lock = Key::new("build").unwrap().id();
        for (text, admits) in [("build", true), ("*", true), ("", true), ("b*", false), ("other", false)] {
            assert_eq!(patterns(text).admit_lock(lock), admits, "{text:?}");
        }
    }

    #[test]
    fn an_unknown_flag_is_refused() {
        assert!(Patterns::parse(["!root"].into_iter()).unwrap_err().contains("!admin"));
    }
}
