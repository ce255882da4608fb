//! First-in, first-out lists of requests, threaded through the requests themselves: to join and to leave, from
//! anywhere, costs the same however long the list is, and allocates nothing.

use slab::Slab;

use super::{Request, RequestId};

/// The ends of a list. A request is in one list at the most.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct List {
    head: Option<RequestId>,
    tail: Option<RequestId>,
}

/// A request's neighbours in the list that it is in.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Links {
    prev: Option<RequestId>,
    next: Option<RequestId>,
}

impl List {
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

    /// Puts `id` behind all that come before it in the order of arrival, and before the others. Searched from the end,
    /// since those who come again come about in order.
    pub(super) fn insert_by_order(&mut self, requests: &mut Slab<Request>, id: RequestId) {
        let order = requests[id.index()].order;
        let mut prev = self.tail;
        while let Some(other) = prev
            && requests[other.index()].order > order
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
    #[cfg(test)]
    pub(super) fn audit(self, requests: &Slab<Request>) -> Vec<RequestId> {
        let forward: Vec<_> = self.iter(requests).collect();
        let mut backward: Vec<_> =
            std::iter::successors(self.tail, |id| requests[id.index()].links.prev).collect();
        backward.reverse();
        assert_eq!(forward, backward, "a list reads otherwise from its end");
        forward
    }
}
