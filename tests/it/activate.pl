# A service manager with one service: listens on a Unix socket, and for each line of standard input starts the daemon on
# it (sd_listen_fds(3)), after ending the one before with SIGKILL. Prints the pid of each.
#
#   activate.pl SOCKET NOTIFY LOG PROGRAM ARGUMENTS...
use strict;
use warnings;
use IO::Socket::UNIX;
use POSIX qw(dup2);

$| = 1;
# Perl closes what it opens beyond this on exec; the listener is to stay.
$^F = 10;
my ($path, $notify, $log, @command) = @ARGV;
my $listener = IO::Socket::UNIX->new(Local => $path, Listen => 100) or die "$path: $!\n";
my $pid;
sub end { if ($pid) { kill 'KILL', $pid; waitpid $pid, 0 } }
while (<STDIN>) {
    end();
    $pid = fork // die "fork: $!\n";
    if (!$pid) {
        dup2(fileno $listener, 3) // die "dup2: $!\n";
        @ENV{qw(LISTEN_FDS LISTEN_PID NOTIFY_SOCKET)} = (1, $$, $notify);
        open STDERR, '>>', $log or die "$log: $!\n";
        exec @command or die "@command: $!\n";
    }
    print "$pid\n";
}
end();
