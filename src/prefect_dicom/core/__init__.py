"""The words of the domain that every other package uses; imports nothing of this one."""
