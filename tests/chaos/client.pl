# One client of the chaos test, in its critical section: says that it enters, stays for a moment, says that it leaves.
#
#   client.pl section LOG NAME KEY KIND MICROSECONDS          under kmutex run, which tells the token
#   client.pl owner LOG NAME KEY KIND MICROSECONDS SOCKET     takes the lock itself, with protocol 1
use strict;
use warnings;
use Digest::MD5 qw(md5);
use Fcntl;
use IO::Socket::UNIX;
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC usleep);

my ($what, $log, $name, $key, $kind, $micros, $sock) = @ARGV;
sysopen(my $out, $log, O_WRONLY | O_APPEND | O_CREAT) or die "$log: $!\n";

# A line is one write, so that those of many processes do not mix.
sub note {
    my $word = shift;
    my $token = $ENV{KMUTEX_TOKEN} // '-';
    my $line = sprintf "%s %s %s %s %s %d %.9f\n", $word, $name, $key, $kind, $token, $$, clock_gettime(CLOCK_MONOTONIC);
    syswrite($out, $line) == length $line or die "$log: $!\n";
}

my $socket;
if ($what eq 'owner') {
    delete $ENV{KMUTEX_TOKEN};
    $SIG{PIPE} = 'IGNORE';
    my $answer = '';
    until ($answer) {
        # A daemon that is away comes back.
        $socket ||= IO::Socket::UNIX->new(Peer => $sock);
        if (!$socket) { usleep(2000); next }
        if (!syswrite($socket, md5($key)) || !sysread($socket, $answer, 1)) { undef $socket; $answer = '' }
    }
    # Somebody else has done the work. (To ask again and again is to be overtaken for ever by those who queue.)
    exit 79 if $answer eq 'R';
}
note('enter');
usleep($micros);
note('leave');
syswrite($socket, 'R') if $socket;
