//! Listing what all hosts hold, for `kmutex status --cluster`: read from etcd page by page, and no faster than the client
//! reads it.

use std::collections::VecDeque;

use super::link::{Order, Page};
use super::{Server, Sharing};
use crate::cluster::Contender;
use crate::etcd;
use crate::proto::LockId;
use crate::proto::v2::{Answer, ErrorCode, LISTED_MAX, LockStatus, encode, error};
use crate::table::ClientId;

/// What one client is being told.
pub(super) struct Listing {
    number: u64,
    /// The line that the last page ended in, which may go on in the next.
    begun: Option<Begun>,
    /// What the client has not been sent yet.
    ready: VecDeque<LockStatus>,
    next: Next,
}

enum Next {
    /// A page is under way.
    Asked,
    /// Where the next page begins.
    From(Vec<u8>),
    /// There is no more.
    End,
}

struct Begun {
    lock: LockId,
    /// The first few in the order of the line.
    contenders: Vec<Contender>,
    count: u32,
}

impl Listing {
    pub(super) fn new(number: u64) -> Listing {
        Listing { number, begun: None, ready: VecDeque::new(), next: Next::Asked }
    }

    fn add(&mut self, sharing: &Sharing, page: Page) {
        for (lock, contender) in page.contenders {
            match &mut self.begun {
                Some(begun) if begun.lock == lock => begun.add(contender),
                _ => {
                    self.ready.extend(self.begun.take().map(|begun| begun.status(sharing)));
                    self.begun = Some(Begun { lock, contenders: vec![contender], count: 1 });
                }
            }
        }
        self.next = match page.next {
            Some(from) => Next::From(from),
            None => {
                self.ready.extend(self.begun.take().map(|begun| begun.status(sharing)));
                Next::End
            }
        };
    }
}

impl Begun {
    fn add(&mut self, contender: Contender) {
        self.count += 1;
        self.contenders.push(contender);
        self.contenders.sort_by_key(|contender| contender.revision);
        self.contenders.truncate(LISTED_MAX + 1);
    }

    fn status(self, sharing: &Sharing) -> LockStatus {
        let key = self.contenders.iter().find_map(|contender| contender.claim.as_ref()?.key.clone());
        let mut parties = self.contenders.iter().map(|contender| sharing.party(contender));
        let holders = parties.by_ref().take(1).collect();
        let modes =
            self.contenders[1..].iter().map(|contender| contender.claim.as_ref().map(|claim| claim.mode));
        let waiters = parties.zip(modes).map(|(mut party, mode)| {
            (party.token, party.mode) = (None, mode);
            party
        });
        LockStatus {
            id: self.lock.to_string(),
            holders,
            holding: 1,
            waiters: waiters.collect(),
            waiting: self.count - 1,
            key,
        }
    }
}

impl Server {
    /// Begins to list all that all hosts hold. False: one is under way.
    pub(in crate::daemon) fn list_cluster(&mut self, client: ClientId) -> bool {
        let Some(sharing) = &mut self.sharing else { return true };
        if sharing.listings.contains_key(&client.0) {
            return false;
        }
        let number = sharing.next_number();
        sharing.listings.insert(client.0, Listing::new(number));
        sharing.link.order(Order::Page { number, from: Vec::new() });
        true
    }

    /// A page has come, or has not.
    pub(super) fn listed(&mut self, number: u64, page: Result<Page, etcd::Error>) {
        let Some(sharing) = &mut self.sharing else { return };
        let its = |(_, listing): &(&u32, &Listing)| listing.number == number;
        let Some(client) = sharing.listings.iter().find(its).map(|(client, _)| *client) else { return };
        let mut listing = sharing.listings.remove(&client).expect("it was found");
        match page {
            Ok(page) => {
                listing.add(sharing, page);
                sharing.listings.insert(client, listing);
                self.mark_dirty(ClientId(client));
            }
            Err(e) => self.answer(ClientId(client), &error(ErrorCode::Unavailable, format!("etcd: {e}"))),
        }
    }

    /// Writes as much of a listing as there is room for.
    pub(in crate::daemon) fn continue_listing(&mut self, client: ClientId, room: impl Fn(usize) -> bool) {
        let Some(sharing) = &mut self.sharing else { return };
        let Some(listing) = sharing.listings.get_mut(&client.0) else { return };
        let connection = &mut self.connections[client.0 as usize];
        while room(connection.output().len())
            && let Some(status) = listing.ready.pop_front()
        {
            encode(&Answer::Lock(status), connection.output());
        }
        if !listing.ready.is_empty() {
            return;
        }
        match std::mem::replace(&mut listing.next, Next::Asked) {
            Next::Asked => {}
            Next::From(from) => sharing.link.order(Order::Page { number: listing.number, from }),
            Next::End => {
                encode(&Answer::End, connection.output());
                sharing.listings.remove(&client.0);
            }
        }
    }

    /// True when there is something to write as soon as there is room.
    pub(in crate::daemon) fn has_listing_ready(&self, client: ClientId) -> bool {
        let listing = self.sharing.as_ref().and_then(|sharing| sharing.listings.get(&client.0));
        listing.is_some_and(|listing| !listing.ready.is_empty())
    }

    /// A client is gone.
    pub(in crate::daemon) fn forget_listing(&mut self, client: ClientId) {
        if let Some(sharing) = &mut self.sharing {
            sharing.listings.remove(&client.0);
        }
    }
}
