//! Proves from a log of critical sections that no client was in one beside a client that excludes it.

use std::collections::BTreeMap;

/// How a client wanted its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Exclusive,
    Shared,
    /// The weights of the clients that are inside at a time are at most `slots`.
    Slots {
        slots: u64,
        weight: u64,
    },
}

/// A client's stay in a critical section.
#[derive(Clone, Debug)]
pub struct Section<'a> {
    /// The client.
    pub name: &'a str,
    key: &'a str,
    kind: Kind,
    /// `None`: a client of protocol 1, which has no tokens.
    token: Option<u64>,
    /// When.
    pub entered: f64,
    /// When it left; for a client that ended without a word, when it last wrote that it was inside.
    pub left: f64,
    seen: f64,
    killed: bool,
}

impl Section<'_> {
    /// How many slots it takes.
    fn weight(&self) -> u64 {
        match self.kind {
            Kind::Slots { weight, .. } => weight,
            _ => 0,
        }
    }
}

/// The end of a section whose client has not left.
const INSIDE: f64 = f64::INFINITY;

/// Reads a log and returns how many sections it tells of.
///
/// # Errors
/// The first rule that it finds broken.
pub fn check(log: &str) -> Result<usize, String> {
    check_except(log, |_, _| false)
}

/// As [`check`], but where `may_overlap` returns `true`, the second client may have entered while the first was inside. It
/// must have the larger token then, so that a resource that both write to can refuse the first.
///
/// # Errors
/// The first rule that it finds broken.
pub fn check_except<F>(log: &str, mut may_overlap: F) -> Result<usize, String>
where
    F: FnMut(&Section<'_>, &Section<'_>) -> bool,
{
    let sections = sections(log)?;
    let mut by_key: BTreeMap<&str, Vec<&Section<'_>>> = BTreeMap::new();
    for section in &sections {
        by_key.entry(section.key).or_default().push(section);
    }
    for sections in by_key.values_mut() {
        sections.sort_by(|a, b| a.entered.total_cmp(&b.entered));
        check_exclusion(sections, &mut may_overlap)?;
        check_tokens(sections)?;
    }
    Ok(sections.len())
}

/// Checks that each client that enters may be beside all clients that are inside.
fn check_exclusion(
    sections: &[&Section<'_>],
    may_overlap: &mut impl FnMut(&Section<'_>, &Section<'_>) -> bool,
) -> Result<(), String> {
    let mut inside: Vec<&Section<'_>> = Vec::new();
    for section in sections {
        inside.retain(|other| other.left > section.entered);
        let alone = |kind| matches!(kind, Kind::Exclusive);
        for other in &inside {
            let shared = [section.kind, other.kind].map(|kind| kind == Kind::Shared);
            if alone(section.kind) || alone(other.kind) || shared[0] != shared[1] {
                if may_overlap(other, section) {
                    if let (Some(first), Some(second)) = (other.token, section.token)
                        && first >= second
                    {
                        let (name, other) = (section.name, other.name);
                        return Err(format!("the token of {name} is not larger than that of {other} inside"));
                    }
                    continue;
                }
                return Err(format!(
                    "{} enters {} while {} is inside",
                    section.name, section.key, other.name
                ));
            }
        }
        check_slots(section, &inside, may_overlap)?;
        inside.push(section);
    }
    Ok(())
}

/// Checks that there is room for a client beside the clients that are inside. A client that it may overlap takes no room, if
/// its token is not the larger one.
fn check_slots(
    section: &Section<'_>,
    inside: &[&Section<'_>],
    may_overlap: &mut impl FnMut(&Section<'_>, &Section<'_>) -> bool,
) -> Result<(), String> {
    let Kind::Slots { slots, weight } = section.kind else { return Ok(()) };
    let taken_by = |others: &[&Section<'_>]| others.iter().map(|other| other.weight()).sum::<u64>();
    if taken_by(inside) + weight <= slots {
        return Ok(());
    }
    let mut is_overtaken = |other: &Section<'_>| {
        let is_older =
            !matches!((other.token, section.token), (Some(first), Some(second)) if first >= second);
        is_older && may_overlap(other, section)
    };
    let counted: Vec<_> = inside.iter().copied().filter(|other| !is_overtaken(other)).collect();
    if taken_by(&counted) + weight <= slots {
        return Ok(());
    }
    let names: Vec<_> = counted.iter().map(|other| other.name).collect();
    let (name, key) = (section.name, section.key);
    Err(format!("{name} enters {key} with weight {weight} of {slots} beside {}", names.join(" ")))
}

/// Checks that a client that enters after another has left has the larger token, if the two exclude each other. (If they do
/// not, the client that was granted first may enter later.)
fn check_tokens(sections: &[&Section<'_>]) -> Result<(), String> {
    let told = || sections.iter().filter(|section| section.token.is_some()).copied();
    let mut by_end: Vec<&Section<'_>> = told().collect();
    by_end.sort_by(|a, b| a.left.total_cmp(&b.left));
    let mut ended = by_end.into_iter().peekable();
    let (mut largest, mut largest_alone): (Option<&Section<'_>>, Option<&Section<'_>>) = (None, None);
    for section in told() {
        while let Some(before) = ended.next_if(|before| before.left < section.entered) {
            let larger =
                |largest: Option<&Section<'_>>| largest.is_none_or(|largest| largest.token < before.token);
            if larger(largest) {
                largest = Some(before);
            }
            if before.kind == Kind::Exclusive && larger(largest_alone) {
                largest_alone = Some(before);
            }
        }
        let before = if section.kind == Kind::Exclusive { largest } else { largest_alone };
        if let Some(before) = before
            && section.token <= before.token
        {
            let (name, key) = (section.name, section.key);
            return Err(format!("the token of {name} for {key} is not larger than that of {}", before.name));
        }
    }
    Ok(())
}

/// Returns how many clients entered beside another one that is inside, with which they share this key's lock.
pub fn entered_beside_others(sections: &[Section<'_>], key: &str) -> usize {
    let sharers = || sections.iter().filter(|section| section.key == key && section.kind != Kind::Exclusive);
    let has_company = |section: &&Section<'_>| {
        sharers().any(|other| other.entered < section.entered && section.entered < other.left)
    };
    sharers().filter(has_company).count()
}

/// Reads the sections in a log.
///
/// # Errors
/// What is no log of sections.
pub fn sections(log: &str) -> Result<Vec<Section<'_>>, String> {
    let mut sections: BTreeMap<&str, Section<'_>> = BTreeMap::new();
    for line in log.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        let [word, name, key, kind, token, _pid, time] = words[..] else {
            return Err(format!("not a line of a log: {line:?}"));
        };
        let time: f64 = time.parse().map_err(|_| format!("no time: {line:?}"))?;
        match word {
            "enter" => {
                let (kind, token) = (parse_kind(kind)?, token.parse().ok());
                let (left, seen) = (INSIDE, time);
                let section = Section { name, key, kind, token, entered: time, left, seen, killed: false };
                if sections.insert(name, section).is_some() {
                    return Err(format!("{name} enters twice"));
                }
            }
            "inside" => match sections.get_mut(name) {
                Some(section) if section.left == INSIDE => section.seen = time,
                // The client wrote this just before it was killed.
                Some(section) if section.killed => section.left = section.left.max(time),
                _ => return Err(format!("{name} is inside and never entered")),
            },
            // The client has ended without a word.
            "gone" => match sections.get_mut(name) {
                Some(section) if section.left == INSIDE => section.left = section.seen,
                _ => {}
            },
            "leave" => match sections.get_mut(name) {
                // The client may have left just before it was killed.
                Some(section) if section.left == INSIDE || section.killed => {
                    section.left = time;
                    section.killed = false;
                }
                _ => return Err(format!("{name} leaves and was not inside")),
            },
            // The test killed the client just after it wrote this, so the client was inside at least until then, if at all.
            "killed" => match sections.get_mut(name) {
                Some(section) if section.left == INSIDE => {
                    section.left = time;
                    section.killed = true;
                }
                _ => {}
            },
            _ => return Err(format!("not a line of a log: {line:?}")),
        }
    }
    match sections.values().find(|section| section.left == INSIDE) {
        Some(section) => Err(format!("{} never leaves {}", section.name, section.key)),
        None => Ok(sections.into_values().collect()),
    }
}

/// Returns the part of a log that shows what is wrong: from a second before the first line about the clients that `broken`
/// names up to the last such line.
pub fn excerpt(log: &str, broken: &str) -> String {
    let named: Vec<&str> = broken.split(' ').filter(|word| word.starts_with('c')).collect();
    let is_named = |line: &&str| line.split([' ', '\'']).any(|word| named.contains(&word));
    let time = |line: &str| line.rsplit(' ').next().and_then(|time| time.parse::<f64>().ok()).unwrap_or(0.0);
    let times: Vec<f64> = log.lines().filter(is_named).map(time).collect();
    let first = times.iter().copied().fold(f64::INFINITY, f64::min) - 1.0;
    let last = times.iter().copied().fold(0.0, f64::max);
    let lines = log.lines().filter(|line| (first..=last).contains(&time(line)));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Reads a kind: `exclusive`, `shared`, `slots4`, or `slots4x3` for a client that takes 3 of the 4.
fn parse_kind(text: &str) -> Result<Kind, String> {
    let slots = |numbers: &str| {
        let (slots, weight) = numbers.split_once('x').unwrap_or((numbers, "1"));
        Some(Kind::Slots { slots: slots.parse().ok()?, weight: weight.parse().ok()? })
    };
    let kind = match text {
        "exclusive" => Some(Kind::Exclusive),
        "shared" => Some(Kind::Shared),
        _ => text.strip_prefix("slots").and_then(slots),
    };
    kind.ok_or_else(|| format!("no kind: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of `word name key kind token time`.
    fn checked(lines: &[&str]) -> Result<usize, String> {
        let log: Vec<String> = lines
            .iter()
            .map(|line| {
                let (head, time) = line.rsplit_once(' ').unwrap();
                format!("{head} 1 {time}\n")
            })
            .collect();
        check(&log.concat())
    }

    fn broken(lines: &[&str], rule: &str) {
        let error = checked(lines).unwrap_err();
        assert!(error.contains(rule), "{error}");
    }

    #[test]
    fn a_log_of_good_behaviour_passes() {
        let good = [
            "enter a k exclusive 1 1.0",
            "leave a k exclusive 1 2.0",
            "enter b k exclusive - 2.5",
            "killed b - - - 3.0",
            "enter c k exclusive 3 3.5",
            "enter d other exclusive 2 3.6",
            "leave c k exclusive 3 4.0",
            "leave d other exclusive 2 4.0",
            "enter e k shared 5 5.0",
            "enter f k shared 4 5.1",
            "leave f k shared 4 5.2",
            "leave e k shared 5 5.3",
            "enter g k slots2 7 6.0",
            "enter h k slots2 6 6.1",
            "leave g k slots2 7 6.2",
            "killed z - - - 6.2",
            "leave h k slots2 6 6.3",
            "enter i k slots2 9 7.0",
            "leave i k slots2 9 7.1",
            "enter j k slots2 8 7.2",
            "leave j k slots2 8 7.3",
        ];
        assert_eq!(checked(&good), Ok(10));
    }

    #[test]
    fn two_in_an_exclusive_section_are_seen() {
        let two = |first: &str, second: &str| {
            let [a, b] = [first, second].map(|kind| format!("k {kind}"));
            broken(
                &[
                    &format!("enter a {a} 1 1.0"),
                    &format!("enter b {b} 2 1.5"),
                    &format!("leave a {a} 1 2.0"),
                    &format!("leave b {b} 2 3.0"),
                ],
                "b enters k while a is inside",
            );
        };
        two("exclusive", "exclusive");
        two("exclusive", "shared");
        two("shared", "exclusive");
        two("shared", "slots2");
        two("exclusive", "slots9");
    }

    #[test]
    fn one_that_is_killed_is_inside_until_then() {
        broken(
            &[
                "enter a k exclusive 1 1.0",
                "enter b k exclusive 2 1.5",
                "killed a - - - 2.0",
                "leave b k exclusive 2 3.0",
            ],
            "b enters k while a is inside",
        );
    }

    #[test]
    fn one_that_leaves_while_it_is_being_killed_is_inside_until_it_leaves() {
        let log = [
            "enter a k exclusive 1 1.0",
            "killed a - - - 2.0",
            "leave a k exclusive 1 2.2",
            "enter b k exclusive 2 2.1",
            "leave b k exclusive 2 3.0",
        ];
        broken(&log, "b enters k while a is inside");
    }

    #[test]
    fn one_that_ends_without_a_word_was_inside_as_long_as_it_said_so() {
        let log = |enter: &str| {
            [
                "enter a k exclusive 1 1.0",
                "inside a k exclusive 1 1.5",
                "inside a k exclusive 1 2.0",
                enter,
                "gone a - - - 9.0",
                "leave b k exclusive 2 3.0",
            ]
            .map(String::from)
        };
        let at = |enter: &str| checked(&log(enter).iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(at("enter b k exclusive 2 2.1"), Ok(2));
        assert_eq!(at("enter b k exclusive 2 1.9"), Err("b enters k while a is inside".into()));
        broken(&["inside a k exclusive 1 1.0"], "a is inside and never entered");
    }

    #[test]
    fn one_that_may_be_overtaken_must_have_the_smaller_token() {
        let log = |first: u64| {
            format!(
                "enter a k exclusive {first} 1 1.0\nenter b k exclusive 2 1 1.5\n\
                 leave a k exclusive {first} 1 2.0\nleave b k exclusive 2 1 3.0\n"
            )
        };
        let may = |first: &Section<'_>, second: &Section<'_>| first.name == "a" && second.name == "b";
        assert_eq!(check_except(&log(1), may), Ok(2));
        assert!(check_except(&log(1), |first, _| first.name == "b").is_err());
        assert!(check_except(&log(2), may).unwrap_err().contains("not larger than that of a"));
    }

    #[test]
    fn one_too_many_for_the_slots_is_seen() {
        let enter = ["enter a k slots2 1 1.0", "enter b k slots2 2 1.1", "enter c k slots2 3 1.2"];
        let leave = ["leave a k slots2 1 2.0", "leave b k slots2 2 2.0", "leave c k slots2 3 2.0"];
        broken(&[enter, leave].concat(), "c enters k with weight 1 of 2 beside a b");
    }

    /// Three clients that enter one after the other, and leave one after the other.
    fn three(kinds: [&str; 3]) -> Vec<String> {
        let line = |word: &str, name: usize, time: usize| {
            format!("{word} {} k {} {} 1 {time}\n", ["a", "b", "c"][name], kinds[name], name + 1)
        };
        let at =
            |word: &str, from: usize| (0..3).map(|name| line(word, name, from + name)).collect::<Vec<_>>();
        [at("enter", 1), at("leave", 5)].concat()
    }

    #[test]
    fn weights_of_the_slots_are_added_up() {
        assert_eq!(check(&three(["slots6x1", "slots6x2", "slots6x3"]).concat()), Ok(3));
        let error = check(&three(["slots6x1", "slots6x3", "slots6x3"]).concat()).unwrap_err();
        assert_eq!(error, "c enters k with weight 3 of 6 beside a b");
    }

    #[test]
    fn one_that_may_be_overtaken_takes_no_slot_of_a_client_with_a_larger_token() {
        let log = three(["slots4x2", "slots4x2", "slots4x2"]);
        let is_a = |first: &Section<'_>, _: &Section<'_>| first.name == "a";
        assert_eq!(check_except(&log.concat(), is_a), Ok(3));
        assert!(check_except(&log.concat(), |first, _| first.name == "d").is_err());
        let later = log.concat().replace("a k slots4x2 1", "a k slots4x2 9");
        assert_eq!(check_except(&later, is_a).unwrap_err(), "c enters k with weight 2 of 4 beside a b");
        let more = three(["slots4x1", "slots4x2", "slots4x3"]);
        assert_eq!(check_except(&more.concat(), is_a).unwrap_err(), "c enters k with weight 3 of 4 beside b");
    }

    #[test]
    fn company_is_that_of_clients_which_share_the_lock() {
        let company = |kinds| entered_beside_others(&sections(&three(kinds).concat()).unwrap(), "k");
        assert_eq!(company(["shared"; 3]), 2);
        assert_eq!(company(["slots3x1"; 3]), 2);
        assert_eq!(company(["exclusive"; 3]), 0);
    }

    #[test]
    fn a_token_that_does_not_grow_is_seen() {
        for token in [4, 5] {
            broken(
                &[
                    "enter a k exclusive 5 1.0",
                    "leave a k exclusive 5 2.0",
                    &format!("enter b k exclusive {token} 2.5"),
                    &format!("leave b k exclusive {token} 3.0"),
                ],
                "the token of b for k is not larger than that of a",
            );
        }
    }

    #[test]
    fn the_excerpt_shows_what_is_wrong() {
        let lines = [
            "enter c1 k 1.0",
            "# daemon 9 is killed 3.5",
            "enter c2 k 4.0",
            "leave c1 k 5.0",
            "leave c3 k 6.0",
        ];
        let log = lines.map(|line| format!("{line}\n")).concat();
        assert_eq!(
            excerpt(&log, "c2 enters k"),
            lines[1..3].iter().map(|line| format!("{line}\n")).collect::<String>()
        );
    }

    #[test]
    fn a_log_that_makes_no_sense_is_seen() {
        broken(&["enter a k exclusive 1 1.0"], "a never leaves k");
        broken(&["leave a k exclusive 1 1.0"], "a leaves and was not inside");
        broken(&["enter a k exclusive 1 1.0", "enter a k exclusive 2 1.5"], "a enters twice");
        broken(&["enter a k alone 1 1.0"], "no kind");
        broken(&["dance a k exclusive 1 1.0"], "not a line");
        assert!(check("half a li").is_err());
    }
}
