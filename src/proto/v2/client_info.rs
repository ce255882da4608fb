//! Who asks, as the client tells it.

use serde::{Deserialize, Serialize};

use super::ShortText;
use crate::proto::Pid;

/// Who asks for a lock, as the client tells it. For people to read: nothing is decided by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientInfo {
    /// The process id, if it is known.
    #[serde(with = "pid_or_zero")]
    pub pid: Option<Pid>,
    /// The machine's name.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub host: ShortText,
    /// The user's name.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub user: ShortText,
    /// The command that runs, or will run, under the lock.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub command: ShortText,
    /// Whatever the user wants others to see.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub note: ShortText,
}

/// A process id that is 0 on the wire when it is not known.
mod pid_or_zero {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Pid;

    pub(super) fn serialize<S: Serializer>(pid: &Option<Pid>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(Pid::number(*pid))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Pid>, D::Error> {
        u32::deserialize(deserializer).map(Pid::new)
    }
}
