# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_kmutex_global_optspecs
    string join \n h/help V/version
end

function __fish_kmutex_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_kmutex_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_kmutex_using_subcommand
    set -l cmd (__fish_kmutex_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c kmutex -n "__fish_kmutex_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_needs_command" -s V -l version -d 'Print version'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "run" -d 'Run a command under a lock'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "lock" -d 'Take a lock for the shell that this is started from'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "unlock" -d 'Release a lock that kmutex lock has taken'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "status" -d 'Show who holds which locks, and who waits'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "break" -d 'Free a lock by force'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "serve" -d 'Serve locks: the daemon'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s c -l command -d 'Run SHELL_COMMAND with $SHELL -c, or /bin/sh -c if SHELL is not set' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s k -l key -d 'Run under the lock of this KEY and those of all others that are named so, instead of one KEY' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l slots -d 'Take the lock while fewer than N hold it' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s w -l wait -l timeout -d 'Wait for at most SECS seconds, which may have a fraction, then fail; 0 is --nonblock' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s E -l conflict-exit-code -d 'The exit status when the lock was not to be had: busy with --nonblock, or --wait ran out' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l finished-exit-code -d 'The exit status when another holder finished first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l on-peer-failure -d 'What to do when the holder that was waited for has failed: ended with a status other than 0, or died of a signal' -r -f -a "skip\t'Exit with 79 all the same'
retry\t'Ask for the lock again, so that one of those who waited runs the command next'
adopt\t'Exit as that holder did, also when it did not fail'"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l note -d 'Show TEXT to those who wait for this one, and in kmutex status' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l sock -d 'The daemon\'s socket: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l trust-uid -d 'Trust a daemon of this user id too, besides my own and root\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l status-fd -d 'At the end, write what happened to descriptor FD: one JSON object on a line' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l status-file -d 'The same, to FILE' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l on-lost -d 'What to do when the lock is lost while the command runs' -r -f -a "kill\t'Stop the command and its descendants with SIGTERM, then SIGKILL; exit with 74'
continue\t'Warn and let the command run; exit with 74 when it has ended'"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l kill-after -d 'After SIGTERM for a lost lock, send SIGKILL to what is left after SECS seconds' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l queue -d 'Wait for my turn, whoever had the lock before'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s s -l shared -d 'Share the lock with others who ask for a shared one'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s x -l exclusive -d 'Hold the lock alone; this is the default'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s n -l nonblock -d 'Do not wait: if somebody else holds the lock, fail'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l no-autostart -d 'Do not start a daemon if none is there'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l verbose -d 'Say on standard error who holds the lock, and how long it took to get it'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l tree -d 'Hold the lock until all that the command has started has ended, and not only the command itself'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l reentrant -d 'If the lock is held by the kmutex run that this one runs under, run the command without taking it again'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s o -l close -d 'Keep the lock\'s descriptor from the command'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s F -l no-fork -d 'Become the command instead of waiting for it'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l pid -d 'Take it for process PID instead of the one that starts this' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l slots -d 'Take the lock while fewer than N hold it' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s w -l wait -l timeout -d 'Wait for at most SECS seconds, which may have a fraction, then fail; 0 is --nonblock' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s E -l conflict-exit-code -d 'The exit status when the lock was not to be had: busy with --nonblock, or --wait ran out' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l finished-exit-code -d 'The exit status when another holder finished first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l on-peer-failure -d 'What to do when the holder that was waited for has failed: ended with a status other than 0, or died of a signal' -r -f -a "skip\t'Exit with 79 all the same'
retry\t'Ask for the lock again, so that one of those who waited runs the command next'
adopt\t'Exit as that holder did, also when it did not fail'"
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l note -d 'Show TEXT to those who wait for this one, and in kmutex status' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l sock -d 'The daemon\'s socket: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l trust-uid -d 'Trust a daemon of this user id too, besides my own and root\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l queue -d 'Wait for my turn, whoever had the lock before'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s s -l shared -d 'Share the lock with others who ask for a shared one'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s x -l exclusive -d 'Hold the lock alone; this is the default'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s n -l nonblock -d 'Do not wait: if somebody else holds the lock, fail'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l no-autostart -d 'Do not start a daemon if none is there'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l verbose -d 'Say on standard error who holds the lock, and how long it took to get it'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l pid -d 'It was taken for process PID' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l sock -d 'The daemon\'s socket: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l trust-uid -d 'Trust a daemon of this user id too, besides my own and root\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l sock -d 'The daemon\'s socket: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l trust-uid -d 'Trust a daemon of this user id too, besides my own and root\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l json -d 'Print one JSON object for each lock, on a line of its own'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l keys -d 'Print only the keys, each on a line of its own (but not those with control characters in them)'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l cluster -d 'Show the locks of all hosts that share them (see kmutex serve --etcd)'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l watch -d 'Show it again every second, in place, until interrupted'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l sock -d 'The daemon\'s socket: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l trust-uid -d 'Trust a daemon of this user id too, besides my own and root\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -s y -l yes -d 'Do not ask first'
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s s -l sock -l socket -d 'Serve here: a path, a PORT (of 127.0.0.1 and ::1), or HOST:PORT (an IPv6 address in brackets); may be given several times' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s m -l maxconn -d 'Serve at most N connections at a time; more of them wait until there is room' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s t -l timeout -d 'End the hold of a protocol 1 client after SECS seconds, and close its connection; 0 is never' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l log-level -d 'What to log on standard error; $RUST_LOG says it too' -r -f -a "off\t'Nothing'
error\t'What makes the daemon end, or a client lose its connection through no fault of its own'
warn\t'What an administrator should look at'
info\t'Start and stop. This is the default'
debug\t'Every connect, grant, wait, release, expiry and close'"
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l mode -d 'The mode of Unix sockets, in octal' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l group -d 'The group of Unix sockets: a name or a number' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l max-per-uid -d 'Serve at most N connections of one user on Unix sockets; more of them are closed' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l state -d 'Keep the journal in FILE instead of beside the first Unix socket' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l grace -d 'After a restart, keep the lock of a holder that does not come back for SECS seconds' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd -d 'Share the locks with all hosts that name the same etcd: URL is http://HOST:PORT or https://HOST:PORT of a member' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-ca -d 'Trust members of etcd whose certificate is signed by one of those in FILE (PEM), and no others' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-cert -d 'Show the certificate in FILE (PEM) to etcd' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-key -d 'The key of that certificate, in FILE (PEM)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-user -d 'Be user NAME of etcd' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-password-file -d 'That user\'s password is the first line of FILE' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-ttl -d 'The lease of this host lasts SECS seconds without being kept alive, and so do its locks when the host is gone' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-prefix -d 'Keys in etcd begin with PREFIX' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l ready-fd -d 'Write a newline to descriptor FD, and close it, when serving' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l idle-exit -d 'End after SECS seconds without locks and connections' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s f -l force -d 'Remove an old socket file'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l no-log -d 'Log nothing'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l detach -d 'Detach from whoever started this, and write a newline to standard output when serving (used by run)'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'

# Keys, from those that are held or waited for, where a KEY is expected.
complete -c kmutex -n "__fish_kmutex_using_subcommand run lock unlock status break" -f -a "(kmutex status --keys 2>/dev/null)"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s k -l key -x -a "(kmutex status --keys 2>/dev/null)"
