# One client of the chaos tests, in its critical section: says that it enters, every few milliseconds that it is inside, and
# that it leaves.
#
#   client.pl section LOG NAME KEY KIND MICROSECONDS          under kmutex run, which tells the token
#   client.pl stubborn LOG NAME KEY KIND MICROSECONDS         the same, and SIGTERM does not stop it
#   client.pl guest LOG NAME KEY KIND MICROSECONDS UNTIL      under etcdctl lock, not relied on from UNTIL on
#   client.pl owner LOG NAME KEY KIND MICROSECONDS SOCKET     takes the lock itself, with protocol 1
#   client.pl sharer LOG NAME KEY KIND MICROSECONDS SOCKET    the same where other hosts have it too: stops when it is lost,
#                                                             of which it hears by the end of its connection
use strict;
use warnings;
use Digest::MD5 qw(md5);
use Fcntl;
use IO::Socket::UNIX;
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC usleep);

use constant STEP => 10_000;

my ($what, $log, $name, $key, $kind, $micros, $last) = @ARGV;
sysopen(my $out, $log, O_WRONLY | O_APPEND | O_CREAT) or die "$log: $!\n";

# A line is one write, so that those of many processes do not mix.
sub note {
    my $word = shift;
    my $token = $ENV{KMUTEX_TOKEN} // '-';
    my $line = sprintf "%s %s %s %s %s %d %.9f\n", $word, $name, $key, $kind, $token, $$, clock_gettime(CLOCK_MONOTONIC);
    syswrite($out, $line) == length $line or die "$log: $!\n";
}

my $socket;
if ($what eq 'owner' || $what eq 'sharer') {
    delete $ENV{KMUTEX_TOKEN};
    $SIG{PIPE} = 'IGNORE';
    my $answer = '';
    until ($answer) {
        # A daemon that is away comes back.
        $socket ||= IO::Socket::UNIX->new(Peer => $last);
        if (!$socket) { usleep(2000); next }
        if (!syswrite($socket, md5($key)) || !sysread($socket, $answer, 1)) { undef $socket; $answer = '' }
    }
    # Another client has done the work. (A client that asked again each time would starve behind the clients that queue.)
    exit 79 if $answer eq 'R';
}
$SIG{TERM} = 'IGNORE' if $what eq 'stubborn';

# Exits if another client may hold the lock by now.
sub check {
    if ($what eq 'sharer') {
        $socket->blocking(0);
        my $read = sysread($socket, my $bytes, 1);
        exit 74 if defined $read ? $read == 0 : !$!{EAGAIN};
    }
    exit 74 if $what eq 'guest' && clock_gettime(CLOCK_MONOTONIC) >= $last;
}

check();
note('enter');
while ($micros > STEP) {
    usleep(STEP);
    $micros -= STEP;
    check();
    note('inside');
}
usleep($micros);
check();
note('leave');
syswrite($socket, 'R') if $socket;
