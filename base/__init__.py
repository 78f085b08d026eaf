"""What all commands share: errors, command lines, and files that survive a crash."""
