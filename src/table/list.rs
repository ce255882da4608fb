//! First-in, first-out lists of requests, threaded through the requests themselves: joining and leaving, at any position,
//! takes constant time and allocates nothing.

use slab::Slab;

use super::request::{Links, Request, RequestId};

/// The ends of a list. A request is in at most one list.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct List {
    head: Option<RequestId>,
    tail: Option<RequestId>,
}

impl List {
    /// A list without members.
    pub(super) const EMPTY: List = List { head: None, tail: None };

    pub(super) fn head(&self) -> Option<RequestId> {
        self.head
    }

    pub(super) fn tail(&self) -> Option<RequestId> {
        self.tail
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    pub(super) fn push_back(&mut self, requests: &mut Slab<Request>, id: RequestId) {
        requests[id.index()].links = Links { prev: self.tail, next: None };
        match self.tail.replace(id) {
            Some(old) => requests[old.index()].links.next = Some(id),
            None => self.head = Some(id),
        }
    }

    /// Puts `id` where its place in the order of arrival says. Searched from the end, where it almost always belongs.
    pub(super) fn insert_by_place(&mut self, requests: &mut Slab<Request>, id: RequestId) {
        let place = requests[id.index()].place;
        let mut prev = self.tail;
        while let Some(other) = prev
            && requests[other.index()].place > place
        {
            prev = requests[other.index()].links.prev;
        }
        let next = match prev {
            Some(prev) => requests[prev.index()].links.next.replace(id),
            None => self.head.replace(id),
        };
        match next {
            Some(next) => requests[next.index()].links.prev = Some(id),
            None => self.tail = Some(id),
        }
        requests[id.index()].links = Links { prev, next };
    }

    /// `id` must be in this list.
    pub(super) fn unlink(&mut self, requests: &mut Slab<Request>, id: RequestId) {
        let Links { prev, next } = std::mem::take(&mut requests[id.index()].links);
        match prev {
            Some(prev) => requests[prev.index()].links.next = next,
            None => self.head = next,
        }
        match next {
            Some(next) => requests[next.index()].links.prev = prev,
            None => self.tail = prev,
        }
    }

    pub(super) fn iter<'a>(self, requests: &'a Slab<Request>) -> impl Iterator<Item = RequestId> + 'a {
        std::iter::successors(self.head, |id| requests[id.index()].links.next)
    }

    /// All members in order. Panics when they are not linked in both directions.
    #[cfg(any(test, fuzzing))]
    pub(super) fn audit(self, requests: &Slab<Request>) -> Vec<RequestId> {
        let forward: Vec<_> = self.iter(requests).collect();
        let mut backward: Vec<_> =
            std::iter::successors(self.tail, |id| requests[id.index()].links.prev).collect();
        backward.reverse();
        assert_eq!(forward, backward, "a list reads differently from its end");
        forward
    }
}
