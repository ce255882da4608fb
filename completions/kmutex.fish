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
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "lock" -d 'Acquire a lock for the calling shell'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "unlock" -d 'Release a lock acquired with kmutex lock'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "status" -d 'Show the locks with their holders and waiters'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "break" -d 'Take a lock away from its holder'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "forget" -d 'Forget when the work of a lock was last done'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "serve" -d 'Run the lock daemon'
complete -c kmutex -n "__fish_kmutex_needs_command" -f -a "hash-secret" -d 'Hash a secret for kmutex serve --auth-file'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s c -l command -d 'Run SHELL_COMMAND with $SHELL -c, or /bin/sh -c if SHELL is not set' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s k -l key -d 'Lock KEY; repeat to hold several locks' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l slots -d 'Let up to N holders hold the lock at a time' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l fresh -d 'Skip the command if a run that succeeded began less than DURATION ago' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l fresh-failure -d 'Skip the command if a run that failed began less than DURATION ago' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l replace-after -d 'Like --replace, but let the holder finish by itself for DURATION first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l weight -d 'Take N of the --slots' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s w -l wait -l timeout -d 'Fail after waiting for DURATION: seconds, or a number with s, m, h or d (0 means --nonblock)' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s E -l conflict-exit-code -d 'Exit status if the lock could not be acquired (--nonblock, or --wait timed out)' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l finished-exit-code -d 'Exit status if another holder finished first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l on-peer-failure -d 'Choose what to do if the awaited holder failed (exit status other than 0, or death by a signal)' -r -f -a "skip\t'Exit with 79, as after a success'
retry\t'Acquire the lock again, so that one of the waiters runs the command next'
adopt\t'Exit with the holder\'s status, also if it succeeded'"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l note -d 'Show TEXT to waiters and in kmutex status' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l sock -d 'Connect to the daemon at ADDR: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l trust-uid -d 'Trust a daemon of this user id too, besides root\'s and the caller\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l auth-file -d 'Give the name and secret in FILE to a daemon that is reached over TCP [env: KMUTEX_AUTH_FILE]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l tls-ca -d 'Trust daemons at tls:// whose certificate is signed by an authority in FILE (PEM), and no others [env: KMUTEX_TLS_CA]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l tls-cert -d 'Show the certificate in FILE (PEM) to a daemon at tls:// [env: KMUTEX_TLS_CERT]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l tls-key -d 'Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l share -d 'Give the result of the run to the callers that waited for it: standard output, standard error and the exit status' -r -f -a "whole\t'All of it at the end'
live\t'From the beginning, as it comes'"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l share-max -d 'Do not share an output that is longer than SIZE: a number of bytes, or a number with K, M or G' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l stale -d 'Give an older result at once, if that run began less than DURATION ago; one such caller runs the command anew' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l status-fd -d 'Write a report to descriptor FD at the end: one line with a JSON object' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l status-file -d 'Write the report of --status-fd to FILE' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l on-lost -d 'Choose what to do if the lock is lost while the command runs' -r -f -a "kill\t'Stop the command and its descendants with SIGTERM, then SIGKILL; exit with 74'
continue\t'Warn and let the command run; exit with 74 when it has ended'"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l kill-after -d 'Wait for DURATION between SIGTERM and SIGKILL when stopping a command' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l max-hold -d 'Stop the command and its descendants after DURATION (SIGTERM, then SIGKILL); exit with 124' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l warn-after -d 'Warn, here and in the daemon\'s log, if the lock is held for longer than DURATION' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l queue -d 'Wait in line and always run, like flock(1)'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s s -l shared -d 'Acquire a shared lock, which other shared holders can hold too'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s x -l exclusive -d 'Acquire an exclusive lock (the default)'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l coalesce -d 'Wait for the end of a run that begins after this request'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l newest -d 'Wait in line until a newer request with --newest comes; then exit as after --finished-exit-code'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l replace -d 'Stop the holder, wait until its command has ended, and run; implies --queue and --newest'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l no-replace -d 'Do not let requests with --replace stop this command; they wait in line instead'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s n -l nonblock -d 'Fail instead of waiting if another process holds the lock'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l no-autostart -d 'Fail instead of starting a daemon'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l verbose -d 'Report on standard error who holds the lock and how long the wait took'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l tree -d 'Hold the lock until the command and all its descendants have exited'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l refresh -d 'Run the command under the lock that standard input names, which another kmutex run has acquired (used by --stale)'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -l reentrant -d 'Run the command without locking if an enclosing kmutex run already holds the lock'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s o -l close -d 'Close the lock\'s descriptor before running the command'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s F -l no-fork -d 'Replace kmutex with the command instead of waiting for it'
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l pid -d 'Acquire the lock for process PID instead of the calling process' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l fd -d 'Acquire the lock for the open file of descriptor N, as flock(1) does: as long as any process has it open' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l slots -d 'Let up to N holders hold the lock at a time' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l fresh -d 'Skip the command if a run that succeeded began less than DURATION ago' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l fresh-failure -d 'Skip the command if a run that failed began less than DURATION ago' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l replace-after -d 'Like --replace, but let the holder finish by itself for DURATION first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l weight -d 'Take N of the --slots' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s w -l wait -l timeout -d 'Fail after waiting for DURATION: seconds, or a number with s, m, h or d (0 means --nonblock)' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s E -l conflict-exit-code -d 'Exit status if the lock could not be acquired (--nonblock, or --wait timed out)' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l finished-exit-code -d 'Exit status if another holder finished first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l on-peer-failure -d 'Choose what to do if the awaited holder failed (exit status other than 0, or death by a signal)' -r -f -a "skip\t'Exit with 79, as after a success'
retry\t'Acquire the lock again, so that one of the waiters runs the command next'
adopt\t'Exit with the holder\'s status, also if it succeeded'"
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l note -d 'Show TEXT to waiters and in kmutex status' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l sock -d 'Connect to the daemon at ADDR: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l trust-uid -d 'Trust a daemon of this user id too, besides root\'s and the caller\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l auth-file -d 'Give the name and secret in FILE to a daemon that is reached over TCP [env: KMUTEX_AUTH_FILE]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l tls-ca -d 'Trust daemons at tls:// whose certificate is signed by an authority in FILE (PEM), and no others [env: KMUTEX_TLS_CA]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l tls-cert -d 'Show the certificate in FILE (PEM) to a daemon at tls:// [env: KMUTEX_TLS_CERT]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l tls-key -d 'Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l queue -d 'Wait in line and always run, like flock(1)'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s s -l shared -d 'Acquire a shared lock, which other shared holders can hold too'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s x -l exclusive -d 'Acquire an exclusive lock (the default)'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l coalesce -d 'Wait for the end of a run that begins after this request'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l newest -d 'Wait in line until a newer request with --newest comes; then exit as after --finished-exit-code'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l replace -d 'Stop the holder, wait until its command has ended, and run; implies --queue and --newest'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l no-replace -d 'Do not let requests with --replace stop this command; they wait in line instead'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s n -l nonblock -d 'Fail instead of waiting if another process holds the lock'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l no-autostart -d 'Fail instead of starting a daemon'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -l verbose -d 'Report on standard error who holds the lock and how long the wait took'
complete -c kmutex -n "__fish_kmutex_using_subcommand lock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l pid -d 'Release the lock of process PID instead of the calling process' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l fd -d 'Release the lock of the open file of descriptor N' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l sock -d 'Connect to the daemon at ADDR: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l trust-uid -d 'Trust a daemon of this user id too, besides root\'s and the caller\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l auth-file -d 'Give the name and secret in FILE to a daemon that is reached over TCP [env: KMUTEX_AUTH_FILE]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l tls-ca -d 'Trust daemons at tls:// whose certificate is signed by an authority in FILE (PEM), and no others [env: KMUTEX_TLS_CA]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l tls-cert -d 'Show the certificate in FILE (PEM) to a daemon at tls:// [env: KMUTEX_TLS_CERT]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -l tls-key -d 'Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand unlock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l sock -d 'Connect to the daemon at ADDR: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l trust-uid -d 'Trust a daemon of this user id too, besides root\'s and the caller\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l auth-file -d 'Give the name and secret in FILE to a daemon that is reached over TCP [env: KMUTEX_AUTH_FILE]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l tls-ca -d 'Trust daemons at tls:// whose certificate is signed by an authority in FILE (PEM), and no others [env: KMUTEX_TLS_CA]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l tls-cert -d 'Show the certificate in FILE (PEM) to a daemon at tls:// [env: KMUTEX_TLS_CERT]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l tls-key -d 'Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l json -d 'Print one JSON object per lock, each on its own line'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l keys -d 'Print only the keys, one per line (keys with control characters are left out)'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l cluster -d 'Show the clustered locks of all hosts (see kmutex serve --etcd)'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -l watch -d 'Refresh the table every second until interrupted'
complete -c kmutex -n "__fish_kmutex_using_subcommand status" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l sock -d 'Connect to the daemon at ADDR: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l trust-uid -d 'Trust a daemon of this user id too, besides root\'s and the caller\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l auth-file -d 'Give the name and secret in FILE to a daemon that is reached over TCP [env: KMUTEX_AUTH_FILE]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l tls-ca -d 'Trust daemons at tls:// whose certificate is signed by an authority in FILE (PEM), and no others [env: KMUTEX_TLS_CA]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l tls-cert -d 'Show the certificate in FILE (PEM) to a daemon at tls:// [env: KMUTEX_TLS_CERT]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -l tls-key -d 'Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -s y -l yes -d 'Break the lock without asking first'
complete -c kmutex -n "__fish_kmutex_using_subcommand break" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand forget" -l sock -d 'Connect to the daemon at ADDR: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand forget" -l trust-uid -d 'Trust a daemon of this user id too, besides root\'s and the caller\'s' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand forget" -l auth-file -d 'Give the name and secret in FILE to a daemon that is reached over TCP [env: KMUTEX_AUTH_FILE]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand forget" -l tls-ca -d 'Trust daemons at tls:// whose certificate is signed by an authority in FILE (PEM), and no others [env: KMUTEX_TLS_CA]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand forget" -l tls-cert -d 'Show the certificate in FILE (PEM) to a daemon at tls:// [env: KMUTEX_TLS_CERT]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand forget" -l tls-key -d 'Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand forget" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s s -l sock -l socket -d 'Listen on ADDR: a path, a PORT (of 127.0.0.1 and ::1), or HOST:PORT (an IPv6 address in brackets); repeat for more' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s m -l maxconn -d 'Serve at most N connections at a time; refuse further ones' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s t -l timeout -d 'Release the lock of a protocol 1 client after DURATION and close its connection; 0 means never' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l log-level -d 'Log level for standard error [env: RUST_LOG]' -r -f -a "off\t'Nothing'
error\t'Errors that end the daemon, or that cost a client its connection through no fault of the client'
warn\t'Conditions that an administrator should look at'
info\t'Start and stop. This is the default'
debug\t'Every connect, grant, wait, release, expiry and close'"
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l mode -d 'Create Unix sockets with this octal mode' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l group -d 'Create Unix sockets with this group: a name or a number' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l max-per-uid -d 'Serve at most N connections per user on Unix sockets; refuse further ones' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l reserve -d 'Reserve the keys that begin with PREFIX for USER, or for the members of :GROUP; repeat for more' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l state -d 'Keep the journal in FILE instead of beside the first Unix socket' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l grace -d 'Keep the lock of a holder that has not reconnected for DURATION after a restart' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l peer-timeout -d 'Count a machine at the other end of a TCP connection as gone when it says nothing for DURATION; 0 means never' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l remember-max -d 'Remember for N locks when their work was last done (see run --fresh); the oldest are forgotten first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l share-total -d 'Keep at most SIZE of results for run --share with --fresh; the oldest are dropped first' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l auth-file -d 'Admit only clients over TCP that give a name and its secret, as listed in FILE' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l tls-cert -d 'Show the certificate in FILE (PEM) to clients of tls:// addresses [env: KMUTEX_TLS_CERT]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l tls-key -d 'Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l tls-client-ca -d 'Admit only clients whose certificate is signed by an authority in FILE (PEM) [env: KMUTEX_TLS_CLIENT_CA]' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd -d 'Cluster the locks with all hosts that use the same etcd; URL is http://HOST:PORT or https://HOST:PORT of a member' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-ca -d 'Trust only members of etcd with a certificate signed by an authority in FILE (PEM)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-cert -d 'Client certificate (PEM)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-key -d 'Key of the client certificate (PEM)' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-user -d 'etcd user name' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-password-file -d 'File whose first line is the password of the etcd user' -r -F
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-ttl -d 'Time to live of this host\'s lease: if the host dies, its locks are free after SECS seconds' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-timeout -d 'Wait SECS seconds for each answer of a member, before kmutex tries the next one' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l etcd-prefix -d 'Prefix of all keys in etcd' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l ready-fd -d 'Write a newline to descriptor FD when serving, and close it' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l idle-exit -d 'Exit after DURATION without locks and connections' -r
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s f -l force -d 'Remove an old socket file'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l no-log -d 'Log nothing'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l show-commands -d 'Show the commands and notes of all users to every user'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l remote -d 'Treat all clients as if they were on other machines, because they come through a forwarder such as sshd'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l share-across-users -d 'Give root\'s results (run --share) to the callers of all users'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l open -d 'Serve TCP ports that other hosts can reach without --auth-file or --tls-client-ca: every client may take every lock'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -l detach -d 'Detach from the calling process, and write a newline to standard output when serving (used by run)'
complete -c kmutex -n "__fish_kmutex_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kmutex -n "__fish_kmutex_using_subcommand hash-secret" -s h -l help -d 'Print help (see more with \'--help\')'

# Completes with the keys that are held or waited for, where a KEY is expected.
complete -c kmutex -n "__fish_kmutex_using_subcommand run lock unlock status break" -f -a "(kmutex status --keys 2>/dev/null)"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s k -l key -x -a "(kmutex status --keys 2>/dev/null)"
