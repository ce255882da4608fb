//! The token that etcd gives for a name and a password, shared by all threads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::User;
use super::error::Failure;

/// The token, if there is a user and one was given.
#[derive(Debug)]
pub(super) struct Tokens {
    user: Option<User>,
    state: Mutex<State>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// The next request asks for a token.
    Unknown,
    /// This etcd has no users; it accepts requests without a token.
    NotNeeded,
    Given(Arc<str>),
}

impl Tokens {
    pub(super) fn new(user: Option<User>) -> Tokens {
        Tokens { user, state: Mutex::new(State::Unknown) }
    }

    /// Makes an attempt with the token. If etcd rejects the token, makes one more attempt with a new token, which `ask` gets.
    pub(super) fn with_token<T>(
        &self,
        ask: impl Fn(&User) -> Result<String, Failure>,
        attempt: impl Fn(Option<&str>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Some(user) = &self.user else { return attempt(None) };
        let token = self.get(|| ask(user))?;
        match attempt(token.as_deref()) {
            Err(failure) if failure.is_stale_token() => {
                self.forget(token.as_deref());
                attempt(self.get(|| ask(user))?.as_deref())
            }
            other => other,
        }
    }

    /// Forgets a token that etcd does not take any more, unless another thread has got a new one since.
    pub(super) fn forget(&self, token: Option<&str>) {
        let mut state = self.state();
        let current = match &*state {
            State::Given(current) => Some(&**current),
            _ => None,
        };
        if current == token {
            *state = State::Unknown;
        }
    }

    /// No thread waits for another one that asks: two may ask at the same time, and both tokens are good.
    fn get(&self, ask: impl Fn() -> Result<String, Failure>) -> Result<Option<Arc<str>>, Failure> {
        match self.state().clone() {
            State::Given(token) => return Ok(Some(token)),
            State::NotNeeded => return Ok(None),
            State::Unknown => {}
        }
        let (token, state) = match ask() {
            Ok(token) => {
                let token: Arc<str> = token.into();
                (Some(Arc::clone(&token)), State::Given(token))
            }
            Err(failure) if failure.is_auth_disabled() => (None, State::NotNeeded),
            // A request for a token changes nothing: what was to be done was not begun.
            Err(Failure::NoAnswer { why, .. }) => return Err(Failure::NotSent(why)),
            Err(failure) => return Err(failure),
        };
        *self.state() = state;
        Ok(token)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so a thread that panicked has left it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn tokens() -> Tokens {
        Tokens::new(Some(User { name: "u".into(), password: "p".into() }))
    }

    fn refused(code: i64, message: &str) -> Failure {
        Failure::Refused { code, message: message.into() }
    }

    #[test]
    fn a_token_is_asked_for_once_and_again_when_it_is_stale() {
        let (tokens, asked) = (tokens(), Cell::new(0));
        let ask = |_: &User| {
            asked.set(asked.get() + 1);
            Ok(format!("t{}", asked.get()))
        };
        let used = |token: Option<&str>| Ok(token.unwrap_or_default().to_string());
        assert_eq!(tokens.with_token(ask, used).unwrap(), "t1");
        assert_eq!(tokens.with_token(ask, used).unwrap(), "t1");
        let only_t2 = |token: Option<&str>| match token {
            Some("t2") => Ok(()),
            _ => Err(refused(16, "etcdserver: invalid auth token")),
        };
        tokens.with_token(ask, only_t2).unwrap();
        assert_eq!(asked.get(), 2);
        // One renewal at the most for each attempt.
        let never = |_: Option<&str>| Err::<(), _>(refused(16, "etcdserver: invalid auth token"));
        assert_eq!(tokens.with_token(ask, never), Err(refused(16, "etcdserver: invalid auth token")));
        assert_eq!(asked.get(), 3);
    }

    #[test]
    fn an_etcd_without_users_needs_no_token_until_it_has_some() {
        let tokens = tokens();
        let disabled = |_: &User| Err(refused(9, "etcdserver: authentication is not enabled"));
        assert_eq!(tokens.with_token(disabled, |token| Ok(token.is_none())), Ok(true));
        let needs = |token: Option<&str>| match token {
            Some("t") => Ok(()),
            _ => Err(refused(3, "etcdserver: user name is empty")),
        };
        assert_eq!(tokens.with_token(|_| Ok("t".into()), needs), Ok(()));
    }

    #[test]
    fn a_thread_does_not_forget_the_token_that_another_has_renewed() {
        let tokens = tokens();
        let ask = |_: &User| Ok("new".to_string());
        tokens.with_token(ask, |_| Ok(())).unwrap();
        tokens.forget(Some("old"));
        assert_eq!(*tokens.state(), State::Given("new".into()));
    }

    #[test]
    fn no_token_is_asked_for_without_a_user() {
        let tokens = Tokens::new(None);
        assert_eq!(tokens.with_token(|_| panic!(), |token| Ok(token.is_none())), Ok(true));
    }

    #[test]
    fn what_needed_a_token_that_did_not_come_was_surely_not_done() {
        let silent = |_: &User| Err(Failure::no_answer("too slow"));
        let failure = tokens().with_token(silent, |_| Ok(())).unwrap_err();
        assert_eq!(failure, Failure::NotSent("too slow".into()));
    }
}
