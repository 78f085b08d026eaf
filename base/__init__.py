"""What every command rests on: errors, command lines, files that survive a crash."""
