//! Results that clients share: from the holder to the outputs, and from there to the waiters.

use super::Server;
use crate::daemon::cluster::Clustering;
use crate::daemon::outputs::{Delivery, Dropped};
use crate::proto::Token;
use crate::proto::v2::{Answer, Mode, OutputAt, Request, Share, Stale};
use crate::table::{ClientId, Notification, NotificationKind};

impl Server {
    /// Returns the number that stands for the user of a client.
    pub(super) fn sharer(&self, client: ClientId) -> u64 {
        let connection = &self.connections[client];
        self.sharers.number(connection.peer().map(|peer| peer.uid), connection.name())
    }

    /// A holder says something of its output. A client that shares nothing, or holds nothing any more, is not heard.
    pub(super) fn output_request(&mut self, client: ClientId, request: Request) {
        let descriptor = self.connections.received.take();
        let Some(token) = self.token_of(client).filter(|_| self.connections[client].share.is_some()) else {
            return;
        };
        let sharer = self.sharer(client);
        let dropped = match request {
            Request::Output => self.outputs.add_file(token, sharer, descriptor),
            Request::Piece { stream, data } => self.outputs.add_piece(token, sharer, stream, &data),
            Request::Withhold { why } => {
                self.outputs.withhold(token, sharer, why);
                return self.tear(token);
            }
            _ => return self.output_has_grown(token),
        };
        self.results_dropped(dropped);
        self.lead(client);
    }

    /// Some results are not kept any more.
    pub(super) fn results_dropped(&mut self, dropped: Vec<Dropped>) {
        dropped.into_iter().for_each(|(lock, token)| self.table.result_dropped(lock, token));
    }

    fn token_of(&self, client: ClientId) -> Option<Token> {
        let (_, request) = self.table.request_of(client)?;
        Some(request.held?.token)
    }

    /// A holder has given its output: the waiters that want it as it comes begin to read it.
    fn lead(&mut self, holder: ClientId) {
        let Some((lock, _)) = self.table.request_of(holder) else { return };
        let is_live = |client: &ClientId| self.connections[*client].share == Some(Share::Live);
        let waiters: Vec<ClientId> =
            lock.waiters().filter_map(|waiter| waiter.client).filter(is_live).collect();
        waiters.into_iter().for_each(|waiter| self.follow(waiter));
    }

    /// A waiter that wants the output as it comes begins to read it, if the holder gives it.
    pub(super) fn follow(&mut self, client: ClientId) {
        let Some((lock, request)) = self.table.request_of(client) else { return };
        // A coalescing request does not wait for the present run.
        if request.asked.is_none_or(|asked| asked.mode != Mode::Once) {
            return;
        }
        let Some(holder) = lock.holders().next() else { return };
        let (Some(token), holder) = (holder.held.map(|held| held.token), holder.client) else { return };
        let id = self.connections.id(client);
        if let Some((file, is_first)) = self.outputs.follow(token, self.sharer(client), id) {
            self.connections.answer_with(client, &Answer::Output { token }, Some(file));
            if let Some(holder) = holder.filter(|_| is_first) {
                self.connections.answer(holder, &Answer::Followed);
            }
        }
    }

    /// Tells the clients that follow an output that there is more to read. A client that has not read what it was told before
    /// will see that without being told again.
    fn output_has_grown(&mut self, token: Token) {
        let (connections, table) = (&self.connections, &self.table);
        self.outputs.retain_followers(token, |&id| {
            connections.find(id).is_some_and(|client| table.request_of(client).is_some())
        });
        for id in self.outputs.followers(token) {
            if let Some(client) =
                self.connections.find(*id).filter(|&client| !self.connections.has_unread(client))
            {
                self.connections.answer(client, &Answer::Grown);
            }
        }
    }

    /// An output that clients follow will not be complete.
    fn tear(&mut self, token: Token) {
        let followers = self.outputs.followers(token).to_vec();
        self.outputs.retain_followers(token, |_| false);
        self.tell_torn(&followers);
    }

    fn tell_torn(&mut self, followers: &[crate::daemon::connection::ConnectionId]) {
        for id in followers {
            if let Some(client) = self.connections.find(*id)
                && self.table.request_of(client).is_some()
            {
                self.connections.answer(client, &Answer::Torn);
            }
        }
    }

    /// A hold has ended.
    pub(super) fn output_ended(&mut self, token: Token) {
        let followers = self.outputs.hold_ended(token);
        self.tell_torn(&followers);
    }

    /// A client is about to release its lock: others may have its result.
    pub(super) fn complete_output(&mut self, client: ClientId) {
        if self.connections[client].share.is_some()
            && let Some(token) = self.token_of(client)
        {
            if self.outputs.complete(token) {
                self.table.has_result(client);
            }
            self.give_to_other_hosts(client, token);
        }
    }

    /// The hosts that share the locks get the result with the release.
    fn give_to_other_hosts(&mut self, client: ClientId, token: Token) {
        let connection = &self.connections[client];
        let user = (connection.peer().map(|peer| peer.uid), connection.name());
        if let Some(cluster) = &mut self.cluster
            && let Some((lock, _)) = self.table.request_of(client)
            && let Some(content) = self.outputs.for_other_hosts(token)
        {
            cluster.keep_result(lock.id(), token, user, content);
        }
    }

    /// Takes in the results of other hosts, of which clients are about to be told.
    pub(super) fn take_remote_results(&mut self) {
        let results = self.cluster.as_mut().map(Clustering::take_results).unwrap_or_default();
        for result in results {
            let dropped = self.outputs.add_remote(result, self.now);
            self.results_dropped(dropped);
        }
    }

    /// Tells a client that shares results of a run that is over, with its output.
    pub(super) fn tell_result(&mut self, notification: Notification) {
        let Notification { client, lock, kind } = notification;
        let passes = self.connections[client].passes_descriptors();
        let (answer, delivery) = match kind {
            NotificationKind::Finished(outcome, token) => {
                let delivery = self.outputs.of_run(token, self.sharer(client), passes);
                (Answer::Finished { outcome, token, output: Some(delivery.at.clone()) }, delivery)
            }
            NotificationKind::Fresh(token) => {
                let Some(run) = self.lookup().run(lock, token) else {
                    unreachable!("the table has just found it")
                };
                let delivery = self.outputs.of_kept(lock, token, self.sharer(client), passes);
                (Answer::Fresh { run, output: Some(delivery.at.clone()) }, delivery)
            }
            NotificationKind::Granted(token) => {
                let (stale, delivery) = self.stale_result(notification, passes).unzip();
                let lease = self.lease_terms(client);
                let none = || Delivery { at: OutputAt::Pieces, pieces: Vec::new(), descriptor: None };
                (Answer::Granted { token, lease, stale: stale.map(Box::new) }, delivery.unwrap_or_else(none))
            }
            _ => unreachable!("the other notifications have no result"),
        };
        delivery.pieces.iter().for_each(|piece| self.connections.answer(client, piece));
        self.connections.answer_with(client, &answer, delivery.descriptor);
    }

    /// Returns the result that a holder may use while it runs anew, if there is one.
    fn stale_result(&self, notification: Notification, passes: bool) -> Option<(Stale, Delivery)> {
        let (_, request) = self.table.request_of(notification.client)?;
        // A holder that has come back had it before.
        let asked = request.asked.filter(|asked| asked.holds.is_none() && asked.stale_ms > 0)?;
        let token = self.table.stale_run(self.now, notification.lock, asked)?.token;
        let sharer = self.sharer(notification.client);
        let delivery = self.outputs.of_kept(notification.lock, token, sharer, passes);
        let run = self.lookup().run(notification.lock, token)?;
        let is_there = !matches!(delivery.at, OutputAt::Withheld(_));
        is_there.then(|| (Stale { run, output: delivery.at.clone() }, delivery))
    }
}
