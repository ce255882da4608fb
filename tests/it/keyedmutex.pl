# A client of protocol 1 in another language, with the interface that users of the old Perl module know:
#
#   my $mutex = Client->new(sock => PATH | "HOST:PORT", auto_reconnect => 1);
#   if (my $lock = $mutex->lock($key)) { ... }    # released when $lock goes; undef: another holder was here
#
# As a program it does what its arguments say:
#
#   keyedmutex.pl SOCK count FILE ROUNDS     ROUNDS times: add 1 to the number in FILE, under a lock
#   keyedmutex.pl SOCK talk                  obey the lines of standard input, answer each with a line
use strict;
use warnings;

package Client;
use Digest::MD5 qw(md5);
use IO::Socket::INET;
use IO::Socket::UNIX;

sub new {
    my ($class, %options) = @_;
    my $self = bless { auto_reconnect => 1, %options }, $class;
    $self->connect or die "cannot connect to $self->{sock}: $!\n";
    return $self;
}

sub connect {
    my $self = shift;
    my $sock = $self->{sock};
    $self->{socket} = $sock =~ /:\d+$/
        ? IO::Socket::INET->new(PeerAddr => $sock)
        : IO::Socket::UNIX->new(Peer => $sock);
    $self->{locked} = 0;
    return $self->{socket};
}

# One answer from the daemon; undef if it has closed the connection.
sub ask {
    my ($self, $key) = @_;
    my $socket = $self->{socket} or return undef;
    local $SIG{PIPE} = 'IGNORE';
    defined syswrite($socket, md5($key)) or return undef;
    sysread($socket, my $answer, 1) or return undef;
    return $answer;
}

sub lock {
    my ($self, $key) = @_;
    die "this client holds a lock already\n" if $self->{locked};
    my $answer = $self->ask($key);
    if (!defined $answer && $self->{auto_reconnect} && $self->connect) {
        $answer = $self->ask($key);
    }
    die "the daemon has gone\n" unless defined $answer;
    return undef unless $answer eq 'O';
    $self->{locked} = 1;
    return Client::Lock->new($self);
}

sub release {
    my $self = shift;
    return unless $self->{locked};
    local $SIG{PIPE} = 'IGNORE';
    syswrite($self->{socket}, 'R');
    $self->{locked} = 0;
}

package Client::Lock;
sub new { my ($class, $client) = @_; return bless { client => $client }, $class }
sub DESTROY { $_[0]{client}->release }

package main;

$| = 1;
my ($sock, $what, @rest) = @ARGV;
my $client = Client->new(sock => $sock);
if ($what eq 'count') {
    my ($file, $rounds) = @rest;
    for my $round (1 .. $rounds) {
        my $lock;
        until ($lock = $client->lock('counter')) { }
        open my $in, '<', $file or die "$file: $!\n";
        my $number = <$in>;
        close $in;
        open my $out, '>', $file or die "$file: $!\n";
        print $out $number + 1;
        close $out or die "$file: $!\n";
    }
}
elsif ($what eq 'talk') {
    my $lock;
    while (my $line = <STDIN>) {
        chomp $line;
        my ($verb, $argument) = split / /, $line;
        if ($verb eq 'lock') {
            $lock = eval { $client->lock($argument) };
            print $@ ? "gone\n" : $lock ? "owner\n" : "another\n";
        }
        elsif ($verb eq 'drop') { undef $lock; print "dropped\n" }
        elsif ($verb eq 'locked') { print $client->{locked} ? "yes\n" : "no\n" }
        elsif ($verb eq 'reconnect') { $client->{auto_reconnect} = $argument; print "set\n" }
    }
}
