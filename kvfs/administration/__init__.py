"""What an administrator does with drives, mounted or not."""
