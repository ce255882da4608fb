//! Holders, waiters and spans of time, in words.

use crate::lookup;
use crate::proto::v2::{LockUser, RunStatus};
use crate::proto::{Outcome, Protocol};

/// Describes a holder or waiter in a few words: `"make", "note" (pid 123, alice on host) for 1m02s`.
pub fn party(party: &LockUser) -> String {
    let who = &party.who;
    let mut told = match who.command.as_str() {
        _ if party.protocol == Protocol::V1 => "a client of protocol 1".to_string(),
        "" => "a command".to_string(),
        command => format!("{command:?}"),
    };
    // The note comes early, so that a narrow terminal shows it.
    if !who.note.is_empty() {
        told.push_str(&format!(", {:?}", who.note.as_str()));
    }
    let user = party.uid.map(user).unwrap_or_else(|| who.user.as_str().into());
    let pid = who.pid.map(|pid| format!("pid {pid}")).unwrap_or_default();
    let place = [("", user.as_str()), ("on ", who.host.as_str())];
    let place = place.iter().filter(|(_, name)| !name.is_empty()).map(|(word, name)| format!("{word}{name}"));
    let place = place.collect::<Vec<_>>().join(" ");
    let known: Vec<_> = [pid, place].into_iter().filter(|part| !part.is_empty()).collect();
    if !known.is_empty() {
        told.push_str(&format!(" ({})", known.join(", ")));
    }
    told.push_str(&format!(" for {}", span(party.for_ms)));
    told
}

/// Describes a run that is over: `done 12 s ago by alice@host`.
pub fn run(run: &RunStatus) -> String {
    let how = match run.outcome {
        Outcome::Exit(0) => "done".to_string(),
        outcome => format!("failed ({outcome})"),
    };
    let by = if run.by.is_empty() { String::new() } else { format!(" by {}", run.by.as_str()) };
    format!("{how} {} ago{by}", span_words(run.age_ms))
}

/// Describes a span of time by its largest units, for a sentence: `12 s`, `1m02s`.
fn span_words(millis: u64) -> String {
    match millis / 1000 {
        seconds @ 0..60 => format!("{seconds} s"),
        _ => span(millis),
    }
}

/// Returns a user's name, or the uid if the user has no name.
pub fn user(uid: u32) -> String {
    lookup::user(uid).unwrap_or_else(|| uid.to_string())
}

/// Describes a span of time by its two largest units: `1m02s`.
pub fn span(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0..60 => format!("{}.{}s", seconds, millis % 1000 / 100),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Pid;
    use crate::proto::v2::ClientInfo;

    #[test]
    fn a_span_is_described_by_its_two_largest_units() {
        let spans =
            [(0, "0.0s"), (59_999, "59.9s"), (61_000, "1m01s"), (3_660_000, "1h01m"), (90_000_000, "1d01h")];
        for (millis, text) in spans {
            assert_eq!(span(millis), text);
        }
    }

    #[test]
    fn a_holder_is_described_as_far_as_it_is_known() {
        let text = |text: &str| text.to_string().into();
        let who = ClientInfo {
            pid: Pid::new(12),
            host: text("h"),
            user: text("u"),
            command: text("make all"),
            note: text("job 7"),
        };
        let known = LockUser {
            protocol: Protocol::V2,
            uid: None,
            who,
            for_ms: 62_000,
            token: None,
            mode: None,
            shared: false,
            orphan: false,
        };
        assert_eq!(party(&known), r#""make all", "job 7" (pid 12, u on h) for 1m02s"#);
        let unknown = LockUser { protocol: Protocol::V1, who: ClientInfo::default(), ..known };
        assert_eq!(party(&unknown), "a client of protocol 1 for 1m02s");
    }
}
